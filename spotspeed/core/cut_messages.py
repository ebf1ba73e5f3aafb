"""What ranks say to each other while they agree on one step, and how it looks on the wire.

A message on the wire is one msgpack array: [code, term counter, term leader, field, ...]. Every
time in it is a number of seconds left, never a point on somebody's clock. Rounds and terms are
explained in `spotspeed.core.cut`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import msgpack

from spotspeed.errors import FormatError

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_TEXT_CHARACTERS = 4096
MAX_INT = 2**63 - 1


class Wish(IntEnum):
    """What a rank wants from the leader."""

    SNAP = 1
    STOP = 2
    CLOSE = 3


class Phase(IntEnum):
    """How far one rank is in one round; only ever grows."""

    NONE = 0
    LOCKED = 1
    DECIDED = 2
    RESTING = 3
    CAPTURED = 4
    DURABLE = 5
    FAILED = 6
    KNOWN = 7


@dataclass(frozen=True, slots=True, order=True)
class Term:
    """One leadership. A later one silences all earlier ones; `leader` makes it unique."""

    counter: int
    leader: int


@dataclass(frozen=True, slots=True)
class Cut:
    """One save that all ranks agreed on: what a ticket is made of, the same on every rank.

    `step` is the agreed step, `stop` says that nobody goes on after it, `source` who asked first,
    `lost` the ranks that were gone when it was decided. `seconds_left` until the machine goes away
    counts from the moment at which this value was handed over.
    """

    round: int
    step: int
    stop: bool
    attempt: str
    created_unix_s: int
    source: str = ""
    seconds_left: float | None = None
    lost: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RoundView:
    """What one rank knows about one decided round; the outcome too when `phase` is KNOWN."""

    cut: Cut
    phase: Phase
    digest: str | None
    why: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Member to leader: a wish; sent again until it is heard."""

    serial: int
    wish: Wish
    seconds_left: float | None
    source: str


@dataclass(frozen=True, slots=True)
class Heard:
    """Leader to member: the wish of that serial is the leader's business now."""

    serial: int


@dataclass(frozen=True, slots=True)
class Prepare:
    """Leader to member: lock your gate and say what you have started."""

    round: int


@dataclass(frozen=True, slots=True)
class Decide:
    """Leader to member: this is the step; later on, a question how far you are."""

    cut: Cut


@dataclass(frozen=True, slots=True)
class Report:
    """Member to leader: how far I am in a round; `started` counts with LOCKED only."""

    round: int
    phase: Phase
    started: int = 0
    digest: str | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Leader to member: the round is over; sealed under `digest`, or not known durable."""

    round: int
    stop: bool
    digest: str | None
    why: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Leader to member: everybody knows the outcome of the stopping round; go."""

    round: int
    digest: str | None
    why: str


@dataclass(frozen=True, slots=True)
class Suspect:
    """Member to the lowest living rank: these ranks are gone, you lead now."""

    lost: tuple[int, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Fence:
    """New leader to survivors: a new term begins; lock and say what you know."""

    lost: tuple[int, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Status:
    """Survivor to new leader: locked at `started`, and everything known about rounds."""

    started: int
    top_round: int
    seconds_left: float | None
    rounds: tuple[RoundView, ...]


@dataclass(frozen=True, slots=True)
class Closed:
    """Leader to member: all ranks have closed."""


@dataclass(frozen=True, slots=True)
class ClosedHeard:
    """Member to leader: you need not wait for me."""


@dataclass(frozen=True, slots=True)
class Gather:
    """Member to leader: my value for the exchange of that serial."""

    serial: int
    label: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Gathered:
    """Leader to member: all values by rank; or `why` it failed; or who is still `missing`."""

    serial: int
    values: tuple[bytes, ...]
    why: str
    missing: tuple[int, ...]


Message = (
    Notice | Heard | Prepare | Decide | Report | Outcome | Leave | Suspect | Fence | Status
    | Closed | ClosedHeard | Gather | Gathered
)  # fmt: skip

_TYPES: dict[int, Any] = dict(enumerate((
    Notice, Heard, Prepare, Decide, Report, Outcome, Leave, Suspect, Fence, Status,
    Closed, ClosedHeard, Gather, Gathered,
), start=1))  # fmt: skip
_CODES: dict[Any, int] = {cls: code for code, cls in _TYPES.items()}


def encode(term: Term, message: Message) -> bytes:
    """The wire form of `message`, sent under `term`; text is cut to MAX_TEXT_CHARACTERS."""
    body = [_plain(getattr(message, name)) for name in _NAMES[type(message)]]
    packed: bytes = msgpack.packb(
        [_CODES[type(message)], term.counter, term.leader, *body], use_bin_type=True
    )
    return packed


def decode(data: bytes, *, source: str) -> tuple[Term, Message]:
    """Parse a wire form strictly; raises FormatError naming `source` when anything is off."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise FormatError(f"{source}: a message of {len(data)} bytes, limit {MAX_MESSAGE_BYTES}")
    try:
        raw = msgpack.unpackb(data, use_list=True, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise FormatError(f"{source}: not a message: {type(error).__name__}") from error
    if not isinstance(raw, list) or len(raw) < 3:
        raise FormatError(f"{source}: not a message: an array of three or more expected")
    cls = _TYPES.get(raw[0]) if type(raw[0]) is int else None
    if cls is None:
        raise FormatError(f"{source}: message code {raw[0]!r} is unknown; are all ranks of one "
                          f"version of spotspeed?")  # fmt: skip
    term = _struct(Term, raw[1:3], source)
    message: Message = _struct(cls, raw[3:], source)
    return term, message


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value[:MAX_TEXT_CHARACTERS]
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    names = _NAMES.get(type(value))
    return value if names is None else [_plain(getattr(value, name)) for name in names]


def _struct(cls: Any, raw: Any, source: str) -> Any:
    names = _NAMES[cls]
    if not isinstance(raw, list) or len(raw) != len(names):
        raise FormatError(f"{source}: {cls.__name__} has {len(names)} fields, found {raw!r:.80}")
    checks = _CHECKS_OF[cls]
    return cls(*(check(item, f"{source}: {cls.__name__}.{name}")
                 for name, check, item in zip(names, checks, raw, strict=True)))  # fmt: skip


def _int(raw: Any, what: str) -> int:
    if type(raw) is not int or not 0 <= raw <= MAX_INT:
        raise FormatError(f"{what} is {raw!r:.80}, expected an integer from 0 to 2**63 - 1")
    return raw


def _bool(raw: Any, what: str) -> bool:
    if type(raw) is not bool:
        raise FormatError(f"{what} is {raw!r:.80}, expected true or false")
    return raw


def _text(raw: Any, what: str) -> str:
    if not isinstance(raw, str) or len(raw) > MAX_TEXT_CHARACTERS:
        raise FormatError(f"{what} is {raw!r:.80}, expected text of up to {MAX_TEXT_CHARACTERS}")
    return raw


def _seconds(raw: Any, what: str) -> float:
    if type(raw) not in (int, float) or not abs(raw) < 1e12:
        raise FormatError(f"{what} is {raw!r:.80}, expected seconds")
    return float(raw)


def _bytes(raw: Any, what: str) -> bytes:
    if not isinstance(raw, bytes):
        raise FormatError(f"{what} is {raw!r:.80}, expected bytes")
    return raw


def _phase(raw: Any, what: str) -> Phase:
    try:
        return Phase(_int(raw, what))
    except ValueError:
        raise FormatError(f"{what} is {raw!r}, which is no phase") from None


def _wish(raw: Any, what: str) -> Wish:
    try:
        return Wish(_int(raw, what))
    except ValueError:
        raise FormatError(f"{what} is {raw!r}, which is no wish") from None


_Check = Callable[[Any, str], Any]


def _optional(check: _Check) -> _Check:
    return lambda raw, what: None if raw is None else check(raw, what)


def _tuple_of(check: _Check) -> _Check:
    def checked(raw: Any, what: str) -> tuple[Any, ...]:
        if not isinstance(raw, list):
            raise FormatError(f"{what} is {raw!r:.80}, expected an array")
        return tuple(check(item, what) for item in raw)

    return checked


_CHECKS: dict[str, _Check] = {
    "int": _int,
    "bool": _bool,
    "str": _text,
    "bytes": _bytes,
    "str | None": _optional(_text),
    "float | None": _optional(_seconds),
    "tuple[int, ...]": _tuple_of(_int),
    "tuple[bytes, ...]": _tuple_of(_bytes),
    "Phase": _phase,
    "Wish": _wish,
    "Cut": lambda raw, what: _struct(Cut, raw, what),
    "tuple[RoundView, ...]": _tuple_of(lambda raw, what: _struct(RoundView, raw, what)),
}
_STRUCTS: tuple[Any, ...] = (Term, Cut, RoundView, *_TYPES.values())
_NAMES: dict[Any, tuple[str, ...]] = {
    cls: tuple(field.name for field in fields(cls)) for cls in _STRUCTS
}
_CHECKS_OF: dict[Any, tuple[_Check, ...]] = {
    cls: tuple(_CHECKS[str(field.type)] for field in fields(cls)) for cls in _STRUCTS
}
