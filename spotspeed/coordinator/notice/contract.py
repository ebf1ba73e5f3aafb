"""The contract of a source of interruption notices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Notice:
    """Word that this machine will or may go away.

    `seconds_left` counts from the moment of the call that delivers it; None when the source names
    no time (`notice.deadline_s` applies). `stop` is False for a hint such as EC2's rebalance
    recommendation: save a snapshot and go on.
    """

    source: str
    seconds_left: float | None
    stop: bool


@dataclass(frozen=True, slots=True)
class Workplace:
    """The scheduler or the managed service that runs this job, and ends it.

    `grace_s` are the seconds from its signal to SIGKILL, as far as it is known; `signals` are what
    it sends; `path_hint` says where checkpoints go there, for an error without a path.
    """

    name: str
    why: str
    """What it was found by."""
    grace_s: float | None = None
    signals: tuple[str, ...] = ("SIGTERM",)
    path_hint: str = ""


class NoticeListener(Protocol):
    """Receives notices on the source's own thread; must return quickly and not raise."""

    def __call__(self, notice: Notice) -> None: ...


class NoticeSource(Protocol):
    """Watches one place for notices and repeats none that it has delivered."""

    @property
    def name(self) -> str:
        """What events and logs call it, such as "ec2" or "file"."""
        ...

    @property
    def period_s(self) -> float:
        """How late it may see a notice, in seconds, while what it watches answers."""
        ...

    def start(self, listener: NoticeListener) -> None:
        """Begin to watch, on a daemon thread; returns without waiting for the network."""
        ...

    def stop(self) -> None:
        """End the watch and its thread, within the source's request timeout; idempotent."""
        ...
