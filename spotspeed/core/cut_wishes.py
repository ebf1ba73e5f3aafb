"""What one rank wants from the leader, said again until it is heard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from spotspeed.core.cut_messages import Message, Notice, Wish


@dataclass(slots=True)
class _Entry:
    notice: Notice
    deadline: float | None
    resend_at: float


@dataclass(slots=True)
class Wishes:
    """The wishes of one rank that were not heard yet. `say` sends to the leader.

    A wish to close is said only when all others were heard: it would silence them.
    """

    resend_s: float
    say: Callable[[Message], None]
    _serial: int = 0
    _open: dict[int, _Entry] = field(default_factory=dict)

    def add(self, wish: Wish, seconds_left: float | None, source: str, now: float) -> None:
        self._serial += 1
        notice = Notice(self._serial, wish, seconds_left, source)
        deadline = None if seconds_left is None else now + seconds_left
        entry = self._open[self._serial] = _Entry(notice, deadline, now)
        self._say_due([entry], now)

    def heard(self, serial: int, now: float) -> None:
        if self._open.pop(serial, None) is not None and len(self._open) == 1:
            last = next(iter(self._open.values()))
            if last.notice.wish is Wish.CLOSE:
                last.resend_at = now
                self._say_due([last], now)

    def tick(self, now: float) -> None:
        self._say_due(list(self._open.values()), now)

    def wake(self) -> float | None:
        return min((entry.resend_at for entry in self._open.values()), default=None)

    def deadline(self) -> float | None:
        """The nearest end that a wish has named."""
        ends = [entry.deadline for entry in self._open.values() if entry.deadline is not None]
        return min(ends, default=None)

    def _say_due(self, entries: list[_Entry], now: float) -> None:
        for entry in entries:
            if now >= entry.resend_at:
                entry.resend_at = now + self.resend_s
                if entry.notice.wish is Wish.CLOSE and len(self._open) > 1:
                    continue
                left = None if entry.deadline is None else entry.deadline - now
                self.say(replace(entry.notice, seconds_left=left))
