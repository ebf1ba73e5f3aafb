"""The gate before every optimizer update: who may enter which update, decided by one comparison."""

from __future__ import annotations

OPEN = 2**62


class Gate:
    """Counts of one rank's updates and the limits on them. Not thread-safe: one mutex around it.

    `started` is the newest update that was entered, `completed` the newest that was left; both may
    jump when a state is loaded. `ceiling` is the newest update that may be entered now: the lock's
    `limit`, or the step of the oldest capture that is not staged, whichever is lower.
    """

    __slots__ = ("_captures", "ceiling", "completed", "limit", "started")

    def __init__(self, position: int = 0) -> None:
        self.started = position
        self.completed = position
        self.limit = OPEN
        self.ceiling = OPEN
        self._captures: dict[int, int] = {}

    def enter(self, position: int) -> bool:
        """Enter update `position` if that is allowed now."""
        if position > self.ceiling:
            return False
        self.started = position
        return True

    def complete(self, position: int) -> None:
        """Update `position` is done; the state is constant until the next `enter`."""
        self.completed = position

    def rests_at(self, position: int) -> bool:
        """Whether the state is exactly that after update `position`."""
        return self.completed == position == self.started

    def lock(self) -> int:
        """Let no further update begin; returns the newest begun one (0 is a number like others)."""
        self.limit = min(self.limit, self.started)
        self._settle()
        return self.started

    def allow(self, limit: int) -> None:
        """Let updates up to `limit` begin."""
        self.limit = limit
        self._settle()

    def hold(self, round_number: int, position: int) -> None:
        """Keep the state of `position` until `drop(round_number)`."""
        self._captures[round_number] = position
        self._settle()

    def drop(self, round_number: int) -> None:
        """The capture of that round is staged or abandoned."""
        if self._captures.pop(round_number, None) is not None:
            self._settle()

    def _settle(self) -> None:
        self.ceiling = min(self.limit, *self._captures.values(), OPEN)
