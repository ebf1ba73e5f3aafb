"""Messages between the ranks of a node and its saver process, and their framing.

A connection begins with a preamble in each direction (magic, protocol version, process id) whose
form never changes, so that savers of different versions recognise each other. Then follow frames:
four bytes of length, little-endian, and a msgpack array of a message's code and fields. A rank's
messages of one save come in the order Begin, Chunks..., End; what was written to the socket is
read by the saver even when the rank has died meanwhile.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import msgpack

from spotspeed.core.documents import build, check_int, check_sha256
from spotspeed.core.frozen import ObjectRecord
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket
from spotspeed.errors import FormatError, InvalidLayoutError

PROTOCOL_VERSION: Final = 2
MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
MAX_SLOTS: Final = 1 << 20
MAX_EPOCH: Final = 2**53

_PREAMBLE = struct.Struct("<8sII")
_MAGIC = b"SPOTSAVR"
PREAMBLE_BYTES: Final = _PREAMBLE.size
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Hello:
    """Opens a session; `arena_bytes` 0 asks for none (an observer: supervise, notify)."""

    rank: int
    pid: int
    arena_bytes: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class NewObject:
    """A frozen object to be written: its content (core/frozen.py) and its number of fragments."""

    content: str
    fragment_count: int


@dataclass(frozen=True, slots=True)
class Begin:
    """Announces a save of this rank: what `core.chunks.pack` is to lay out, and the result's size.

    `compression` is "zstd", "none" or "" for the saver's choice.
    """

    save: int
    ticket: Ticket
    rank: int
    chunk_bytes: int
    chunk_count: int
    raw_bytes: int
    compression: str
    fragments: tuple[Fragment, ...]
    objects: tuple[NewObject, ...] = ()
    """Frozen objects to be written; their fragments and chunks come first, in this order."""
    referred: tuple[ObjectRecord, ...] = ()
    """Frozen objects that are stored already and hold the rest of this rank's part."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """Chunks `first`, `first` + 1, ... lie filled in these slots, which are now the saver's."""

    save: int
    first: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class End:
    """All chunks of the save have been sent."""

    save: int


@dataclass(frozen=True, slots=True)
class Abandon:
    """The save shall not be finished; its slots come back."""

    save: int
    reason: str


@dataclass(frozen=True, slots=True)
class Need:
    """The stager waits: give back written slots as they come, until `count` have been given."""

    count: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Asks for Progress until every save of an epoch below `before_epoch` is settled."""

    before_epoch: int


@dataclass(frozen=True, slots=True)
class Renew:
    """Keep the owner record of `epoch` alive while this session or its saves live."""

    epoch: int
    period_s: float


@dataclass(frozen=True, slots=True)
class UseTier:
    """Write this session's saves to the node's own disk below `local_path`, and drain them.

    What earlier savers left there is drained from now on, and counts for a later Drain.
    """

    local_path: str


@dataclass(frozen=True, slots=True)
class Notify:
    """This machine goes away in `deadline_s` seconds: tell every rank of the node.

    0 says that the time is not known; `notice.deadline_s` applies.
    """

    deadline_s: float
    source: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """The session is open; the arena's descriptor travels with this message when there is one."""

    pid: int
    arena_bytes: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class Refused:
    """No session: `cause` is "memory", "leaving", "storage" or "protocol"."""

    cause: str
    reason: str


@dataclass(frozen=True, slots=True)
class Freed:
    """These slots are the rank's again."""

    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """This rank's shard and receipt are durable on the node's own disk; Stored follows."""

    save: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Bypassed:
    """The node's own disk does not take this save, which goes straight to the store."""

    save: int
    reason: str


@dataclass(frozen=True, slots=True)
class Stored:
    """This rank's shard and receipt are durable, and the frozen objects that they refer to."""

    save: int
    objects: tuple[ObjectRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class Sealed:
    """The checkpoint is sealed; `manifest` is its stored form."""

    save: int
    manifest: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """The save failed for this rank; `reason` has the facts."""

    save: int
    reason: str


@dataclass(frozen=True, slots=True)
class Progress:
    """What a drain still waits for."""

    saves_left: int
    bytes_left: int


@dataclass(frozen=True, slots=True)
class Drained:
    """A drain is over; the directories of the saves that this saver has settled, newest last."""

    sealed: tuple[str, ...]
    stored: tuple[str, ...]
    failed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Noticed:
    """Somebody told the saver that this machine goes away."""

    deadline_s: float
    source: str


Message = (
    Hello | Begin | Chunks | End | Abandon | Need | Drain | Renew | Notify | UseTier
    | Welcome | Refused | Freed | Kept | Bypassed | Stored | Sealed | Failed | Progress | Drained
    | Noticed
)  # fmt: skip

_CODES: dict[int, type[Any]] = {
    1: Hello, 2: Begin, 3: Chunks, 4: End, 5: Abandon, 6: Need, 7: Drain, 8: Renew, 9: Notify,
    10: UseTier,
    33: Welcome, 34: Refused, 35: Freed, 36: Stored, 37: Sealed, 38: Failed, 39: Progress,
    40: Drained, 41: Noticed, 42: Kept, 43: Bypassed,
}  # fmt: skip
_CODE_OF = {kind: code for code, kind in _CODES.items()}


def socket_name(uid: int, url: str) -> str:
    """Name, in the abstract namespace, where the saver of user `uid` for the store `url` listens.

    `url` must be the same text on all ranks of the node: an absolute path or a full URL.
    """
    return f"spotspeed-{uid}-{hashlib.sha256(url.encode()).hexdigest()[:24]}"


def encode_preamble(pid: int, *, version: int = PROTOCOL_VERSION) -> bytes:
    """The first bytes of a connection."""
    return _PREAMBLE.pack(_MAGIC, version, pid)


def decode_preamble(data: bytes) -> tuple[int, int]:
    """(version, pid) of the other side; FormatError when it does not speak this protocol."""
    if len(data) != PREAMBLE_BYTES or data[:8] != _MAGIC:
        raise FormatError(f"saver socket: the other side began with {data[:16]!r}")
    _, version, pid = _PREAMBLE.unpack(data)
    return version, pid


def encode(message: Message) -> bytes:
    """`message` as one frame; FormatError when it is larger than MAX_FRAME_BYTES."""
    code = _CODE_OF[type(message)]
    values = [_plain(getattr(message, field.name)) for field in fields(message)]
    payload: bytes = msgpack.packb([code, *values], use_bin_type=True)
    if len(payload) > MAX_FRAME_BYTES:
        raise FormatError(
            f"saver socket: {type(message).__name__} of {len(payload)} bytes, at most "
            f"{MAX_FRAME_BYTES} fit in a frame"
        )
    return _LENGTH.pack(len(payload)) + payload


class Decoder:
    """Cuts a byte stream into messages; holds at most one unfinished frame."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages completed by `data`; FormatError when the stream is not the protocol."""
        self._pending += data
        while len(self._pending) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._pending)
            if size > MAX_FRAME_BYTES:
                raise FormatError(f"saver socket: a frame of {size} bytes announced")
            stop = _LENGTH.size + size
            if len(self._pending) < stop:
                return
            payload = bytes(self._pending[_LENGTH.size : stop])
            del self._pending[:stop]
            yield decode(payload)


def decode(payload: bytes) -> Message:
    """The message of one frame's payload; FormatError when anything about it is off."""
    try:
        values = msgpack.unpackb(payload, raw=False, use_list=True, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise FormatError(f"saver socket: not msgpack: {error}") from error
    if not isinstance(values, list) or not values or values[0] not in _CODES:
        raise FormatError(f"saver socket: unknown message {str(values)[:80]!r}")
    kind = _CODES[values[0]]
    expected = fields(kind)
    if len(values) - 1 != len(expected):
        raise FormatError(f"saver socket: {kind.__name__} with {len(values) - 1} fields")
    message: Message = kind(
        **{
            field.name: _parse(kind.__name__, field.name, str(field.type), value)
            for field, value in zip(expected, values[1:], strict=True)
        }
    )
    return message


def _plain(value: Any) -> Any:
    if isinstance(value, (Ticket, ObjectRecord, NewObject)):
        return asdict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Fragment):
        key, interval = value.key, value.interval
        return [
            key.kind, key.name, key.scope, value.dtype, list(value.shape),
            interval.start, interval.stop,
        ]  # fmt: skip
    return value


def _parse(message: str, name: str, annotation: str, value: Any) -> Any:
    try:
        return _PARSERS[annotation](value)
    except (TypeError, ValueError, FormatError, InvalidLayoutError) as error:
        raise FormatError(f"saver socket: {message}.{name}: {error}") from error


def _check(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{str(value)[:40]!r} is not {' or '.join(k.__name__ for k in kinds)}")
    return value


def _int(value: Any) -> int:
    number: int = _check(value, int)
    if not 0 <= number <= 2**62:
        raise ValueError(f"{number} is out of range")
    return number


def _fragment(value: Any) -> Fragment:
    kind, name, scope, dtype, shape, start, stop = _check(value, list)
    key = TensorKey(_check(kind, str), _check(name, str), _check(scope, str))
    dimensions = tuple(_int(size) for size in _check(shape, list))
    return Fragment(key, _check(dtype, str), dimensions, Interval(_int(start), _int(stop)))


def _new_object(value: Any) -> NewObject:
    found: NewObject = build(NewObject, value, "saver socket: a new object")
    check_sha256("content", found.content)
    check_int("fragment_count", found.fragment_count, 1, MAX_SLOTS)
    return found


def _tuple_of(parse: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    return lambda value: tuple(parse(item) for item in _check(value, list))


def _str(value: Any) -> str:
    text: str = _check(value, str)
    return text


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "int": _int,
    "float": lambda value: float(_check(value, int, float)),
    "str": _str,
    "bytes": lambda value: _check(value, bytes),
    "tuple[int, ...]": _tuple_of(_int),
    "tuple[str, ...]": _tuple_of(_str),
    "tuple[Fragment, ...]": _tuple_of(_fragment),
    "tuple[NewObject, ...]": _tuple_of(_new_object),
    "tuple[ObjectRecord, ...]": _tuple_of(
        lambda value: build(ObjectRecord, value, "saver socket: an object")
    ),
    "Ticket": lambda value: Ticket(**_check(value, dict)),
}
"""How a field of each annotation is read back."""
