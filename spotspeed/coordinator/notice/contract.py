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


class NoticeListener(Protocol):
    """Receives notices on the source's own thread; must return quickly and not raise."""

    def __call__(self, notice: Notice) -> None: ...


class NoticeSource(Protocol):
    """Watches one place for notices and repeats none that it has delivered."""

    @property
    def name(self) -> str:
        """What events and logs call it, such as "ec2" or "file"."""
        ...

    def start(self, listener: NoticeListener) -> None:
        """Begin to watch, on a daemon thread; returns without waiting for the network."""
        ...

    def stop(self) -> None:
        """End the watch and its thread, within the source's request timeout; idempotent."""
        ...
