"""Messages between the ranks of a node and its saver process, and their framing.

A connection begins with a preamble in each direction (magic, protocol version, process id) whose
form never changes, so that savers of different versions recognise each other. Then follow frames:
four bytes of length, little-endian, and a msgpack array of a message's code and fields. A rank's
messages of one save come in the order Begin, Chunks..., End, and a Describe that it needs before;
what was written to the socket is read by the saver even when the rank has died meanwhile.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import msgpack

from spotspeed.core.frozen import ObjectRecord
from spotspeed.core.layout import Fragment
from spotspeed.core.manifest import Ticket
from spotspeed.core.saver_fields import PARSERS, NewObject
from spotspeed.errors import FormatError, InvalidLayoutError

PROTOCOL_VERSION: Final = 5
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
class Describe:
    """The fragments that the shards of saves to come begin with, until the next Describe."""

    number: int
    chunk_bytes: int
    fragments: tuple[Fragment, ...]


@dataclass(frozen=True, slots=True)
class Begin:
    """Announces a save of this rank: what `core.described` is to lay out, and the result's size.

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
    is_direct: bool = False
    """Whether it goes past the node's own disk: there is no time for both."""
    described: int = 0
    """Number of the last Describe, whose fragments the shard begins with; 0 for none."""


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
class LostPart:
    """A rank's part of the save in `directory` went with an earlier saver: nobody is to wait."""

    directory: str
    rank: int
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
class Cost:
    """What it took to make this rank's shard durable; comes before Kept and before Stored.

    `encode_s` and `write_s` are the seconds that encoding alone and writing alone would have
    taken; `encode_s` is 0 when nothing was encoded, as on the way from the node's disk to the
    store.
    """

    save: int
    is_near: bool
    """On the node's own disk, not at the store."""
    raw_bytes: int
    stored_bytes: int
    encode_s: float
    write_s: float


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
    Hello | Describe | Begin | Chunks | End | Abandon | Need | Drain | Renew | Notify | UseTier
    | Welcome | Refused | Freed | Kept | Bypassed | Cost | Stored | Sealed | Failed | Progress
    | Drained | Noticed | LostPart
)  # fmt: skip

_CODES: dict[int, type[Any]] = {
    1: Hello, 2: Begin, 3: Chunks, 4: End, 5: Abandon, 6: Need, 7: Drain, 8: Renew, 9: Notify,
    10: UseTier, 11: Describe, 12: LostPart,
    33: Welcome, 34: Refused, 35: Freed, 36: Stored, 37: Sealed, 38: Failed, 39: Progress,
    40: Drained, 41: Noticed, 42: Kept, 43: Bypassed,
    44: Cost,
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
        return PARSERS[annotation](value)
    except (TypeError, ValueError, FormatError, InvalidLayoutError) as error:
        raise FormatError(f"saver socket: {message}.{name}: {error}") from error
