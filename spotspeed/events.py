"""Typed records of what happened, and the sinks that receive them.

Every room reports through `emit`; nothing else in spotspeed writes logs about a checkpoint's life.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Protocol

_logger = logging.getLogger("spotspeed")


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all records; the class name is the event's name."""

    def describe(self) -> str:
        """One line: the event's name and its fields."""
        facts = " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        return f"{type(self).__name__.lower()} {facts}".rstrip()


@dataclass(frozen=True, slots=True)
class Attached(Event):
    """An engine is now checkpointed."""

    path: str
    epoch: int
    rank: int
    world_size: int
    provider: str


@dataclass(frozen=True, slots=True)
class Reserved(Event):
    """This rank's staging memory, whose size stays; a save has about `share_bytes`."""

    rank: int
    size_bytes: int
    share_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Noticed(Event):
    """An interruption notice was heard on this rank."""

    source: str
    rank: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Agreed(Event):
    """All ranks know the step of the cut; `latency_s` from the notice at its origin."""

    step: int
    round: int
    stop: bool
    latency_s: float


@dataclass(frozen=True, slots=True)
class Planned(Event):
    """What is to become of a notice's save in the `left_s` seconds that are left, and why.

    `staged_s` and `done_s` are when it is expected to be staged and durable, `patience_s` how long
    it waits for the training's step to end first.
    """

    step: int
    rank: int
    action: str
    left_s: float
    staged_s: float
    done_s: float
    patience_s: float
    compression: str
    is_direct: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Forecast(Event):
    """What a notice of `notice_s` seconds can save, by what the saves so far have taken.

    Before the first one is durable, by a small trial: `is_estimate`. `state_bytes` and
    `largest_bytes` are one rank's.
    """

    notice_s: float
    action: str
    done_s: float
    state_bytes: int
    largest_bytes: int
    reason: str
    is_estimate: bool = False


@dataclass(frozen=True, slots=True)
class Unsafe(Event):
    """This rank's state does not become durable at `path` within a notice.

    That which is to be expected here or, when one has come, what is left of it.
    """

    rank: int
    notice_s: float
    done_s: float
    state_bytes: int
    largest_bytes: int
    cause: str


@dataclass(frozen=True, slots=True)
class Staged(Event):
    """This rank's state is out of the training's memory; it survives the rank from here on."""

    directory: str
    rank: int
    size_bytes: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Kept(Event):
    """This rank's part is durable on the node's own disk; it survives the saver from here on."""

    directory: str
    rank: int
    size_bytes: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Sealed(Event):
    """The checkpoint is complete and durable at `path`."""

    directory: str
    tag: str
    step: int
    size_bytes: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Stalled(Event):
    """The training was held, and why."""

    cause: str
    held_s: float
    step: int


@dataclass(frozen=True, slots=True)
class Lost(Event):
    """A save, a peer or a saver is gone; what it means is in `cause`."""

    what: str
    cause: str
    is_repeated: bool = False
    """Whether the save before was lost for the same cause: the log has warned of it."""


@dataclass(frozen=True, slots=True)
class Bypassed(Event):
    """The node's own disk could not be used for `directory`, and `path` was instead."""

    directory: str
    cause: str


@dataclass(frozen=True, slots=True)
class FellBack(Event):
    """A checkpoint did not verify and an older one is being tried."""

    directory: str
    cause: str


@dataclass(frozen=True, slots=True)
class Resumed(Event):
    """The training state was restored; `near_bytes` of what this rank read lay on its own node."""

    directory: str
    step: int
    written_by: int
    read_by: int
    size_bytes: int
    elapsed_s: float
    near_bytes: int = 0


class Sink(Protocol):
    """Receives every event, on whatever thread it happened; must not block or raise."""

    def __call__(self, event: Event) -> None: ...


_LEVELS: dict[type[Event], int] = {
    Lost: logging.ERROR, FellBack: logging.WARNING, Noticed: logging.WARNING,
    Bypassed: logging.WARNING, Unsafe: logging.WARNING, Staged: logging.DEBUG, Kept: logging.DEBUG,
}  # fmt: skip


def log_sink(event: Event) -> None:
    """The default sink: one line in the "spotspeed" logger."""
    level = _LEVELS.get(type(event), logging.INFO)
    if isinstance(event, Lost) and event.is_repeated:
        level = logging.INFO
    _logger.log(level, event.describe())


_sinks: list[Sink] = [log_sink]


def add_sink(sink: Sink) -> None:
    """Send every later event to `sink` as well."""
    _sinks.append(sink)


def remove_sink(sink: Sink) -> None:
    """Stop sending events to `sink`; unknown sinks are ignored."""
    if sink in _sinks:
        _sinks.remove(sink)


def emit(event: Event) -> None:
    """Hand `event` to every sink; one that raises is logged, for nobody here could go on without.

    Events happen on the threads that hold a job together, and sinks are other people's code.
    """
    for sink in tuple(_sinks):
        try:
            sink(event)
        except Exception:
            _logger.exception("a sink failed on: %s", event.describe())
