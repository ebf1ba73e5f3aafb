"""The index of a shard: its entries and chunks as msgpack, parsed within strict bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgpack

from spotspeed.core.chunks import ENTRY_ALIGNMENT, MAX_CHUNK_BYTES, Entry
from spotspeed.core.documents import FORMAT_MAJOR, FORMAT_NAME, SHARD_MINOR
from spotspeed.core.format import (
    CODEC_RAW,
    CODECS,
    DIGEST_BYTES,
    HEADER_BYTES,
    align_frame,
    check_major,
)
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.errors import FormatError, InvalidLayoutError

MAX_INDEX_BYTES = 64 * 1024 * 1024
MAX_NAME_BYTES = 4096
MAX_DIMENSIONS = 32
MAX_ELEMENTS = 2**60
MAX_ITEM_BYTES = 16 * 1024
"""Most bytes of one entry or chunk: three names and a shape fit."""
_MAX_KEYS = 64
_ENTRY_FIELDS = 8
_CHUNK_FIELDS = 7


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """Where one chunk of the raw stream lies in the file and what its bytes hash to.

    `stored_digest` is of the frame; `raw_digest` of what it decodes to, None for a raw frame.
    """

    raw_offset: int
    raw_size: int
    file_offset: int
    stored_size: int
    codec: int
    stored_digest: bytes
    raw_digest: bytes | None

    @property
    def raw_stop(self) -> int:
        return self.raw_offset + self.raw_size

    @property
    def file_stop(self) -> int:
        return self.file_offset + self.stored_size


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Everything that is needed to find and check any byte of one shard."""

    ticket_digest: bytes
    rank: int
    world_size: int
    raw_bytes: int
    entries: tuple[Entry, ...]
    chunks: tuple[ChunkRecord, ...]
    minor: int = SHARD_MINOR

    @property
    def frames_stop(self) -> int:
        """Where the index begins: the aligned end of the last frame."""
        return align_frame(self.chunks[-1].file_stop) if self.chunks else HEADER_BYTES


def encode_index(index: ShardIndex) -> bytes:
    """The stored form of `index`; a pure function of it."""
    entries = [
        [item.fragment.key.kind, item.fragment.key.name, item.fragment.key.scope,
         item.fragment.dtype, list(item.fragment.shape), item.fragment.interval.start,
         item.fragment.interval.stop, item.raw_offset]
        for item in index.entries
    ]  # fmt: skip
    chunks = [
        [chunk.raw_offset, chunk.raw_size, chunk.file_offset, chunk.stored_size, chunk.codec,
         chunk.stored_digest, chunk.raw_digest]
        for chunk in index.chunks
    ]  # fmt: skip
    data: bytes = msgpack.packb({
        "format": FORMAT_NAME, "document": "index", "major": FORMAT_MAJOR, "minor": index.minor,
        "ticket": index.ticket_digest, "rank": index.rank, "world_size": index.world_size,
        "raw_bytes": index.raw_bytes, "entries": entries, "chunks": chunks,
    })  # fmt: skip
    return data


def parse_index(data: bytes, *, source: str) -> ShardIndex:
    """The index of shard `source`, every number checked; raises FormatError naming `source`.

    Lists are read one checked item at a time, so that hostile input costs no more memory than a
    small multiple of its size.
    """
    if len(data) > MAX_INDEX_BYTES:
        raise FormatError(f"{source}: an index of {len(data)} bytes, the limit is "
                          f"{MAX_INDEX_BYTES}")  # fmt: skip
    try:
        return _Parser(data, source).index()
    except (ValueError, TypeError, OverflowError, msgpack.exceptions.UnpackException) as error:
        raise FormatError(f"{source}: the index does not parse: {error}") from error
    except InvalidLayoutError as error:
        raise FormatError(f"{source}: the index contradicts itself: {error}") from error


class _Parser:
    """Reads one index from front to back; every problem is ValueError or FormatError.

    A scout goes before the unpacker and skips each item without building it, so that nothing is
    built from more than MAX_ITEM_BYTES at once: an empty list costs 64 times its size in memory.
    """

    def __init__(self, data: bytes, source: str) -> None:
        self._source = source
        self._size = len(data)
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=max(1, len(data)), max_str_len=MAX_NAME_BYTES, max_bin_len=64,
            max_array_len=MAX_DIMENSIONS, max_map_len=0, max_ext_len=0,
        )  # fmt: skip
        self._scout = msgpack.Unpacker(max_buffer_size=max(1, len(data)))
        self._unpacker.feed(data)
        self._scout.feed(data)

    def index(self) -> ShardIndex:
        fields: dict[str, Any] = {}
        if (count := self._unpacker.read_map_header()) != self._scout.read_map_header():
            raise ValueError("not a map")
        for _ in range(min(count, _MAX_KEYS + 1)):
            key = _text(self._item())
            if key in fields or len(fields) == _MAX_KEYS:
                raise ValueError(f"{key!r} is there twice, or one key too many")
            fields[key] = self._field(key, fields)
        if self._unpacker.tell() != self._size:
            raise ValueError("bytes follow the index")
        missing = {*_READERS, "entries", "chunks"} - fields.keys()
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        if (fields["format"], fields["document"]) != (FORMAT_NAME, "index"):
            raise ValueError("not a shard's index")
        if not fields["rank"] < fields["world_size"]:
            raise ValueError(f"rank {fields['rank']} of {fields['world_size']}")
        return ShardIndex(
            fields["ticket"], fields["rank"], fields["world_size"], fields["raw_bytes"],
            fields["entries"], fields["chunks"], fields["minor"],
        )  # fmt: skip

    def _field(self, key: str, fields: dict[str, Any]) -> Any:
        if key in _READERS:
            value = _READERS[key](self._item())
            if key == "major":
                check_major(value, "x", self._source)
            return value
        if key not in ("entries", "chunks"):
            if fields.get("minor", 0) <= SHARD_MINOR:
                raise ValueError(f"unknown key {key!r}")
            self._unpacker.skip()
            self._scout.skip()
            return None
        if "raw_bytes" not in fields:
            raise ValueError(f"raw_bytes must come before {key}")
        items = self._items(_ENTRY_FIELDS if key == "entries" else _CHUNK_FIELDS)
        return (_entries if key == "entries" else _chunks)(items, fields["raw_bytes"])

    def _items(self, field_count: int) -> Iterator[list[Any]]:
        """The items of a list, each a list of `field_count` scalars or short lists."""
        count = self._unpacker.read_array_header()
        if count != self._scout.read_array_header() or count > self._size:
            raise ValueError(f"a list of {count} items in {self._size} bytes")
        for _ in range(count):
            item = self._item()
            if type(item) is not list or len(item) != field_count:
                raise ValueError(f"{item!r:.80} has not {field_count} fields")
            yield item

    def _item(self) -> Any:
        start = self._scout.tell()
        self._scout.skip()
        if self._scout.tell() - start > MAX_ITEM_BYTES:
            raise ValueError(f"an item of {self._scout.tell() - start} bytes")
        return self._unpacker.unpack()


def _entries(items: Iterator[list[Any]], raw_bytes: int) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    reach = 0
    for kind, name, scope, dtype, shape, start, stop, raw_offset in items:
        key = TensorKey(_text(kind), _text(name), _text(scope))
        _check_shape(shape)
        span = Interval(_number(start, MAX_ELEMENTS), _number(stop, MAX_ELEMENTS))
        fragment = Fragment(key, _text(dtype), tuple(shape), span)
        raw_stop = _number(raw_offset, raw_bytes) + fragment.size_bytes
        if raw_offset % ENTRY_ALIGNMENT or raw_offset < reach or raw_stop > raw_bytes:
            raise ValueError(f"{key} cannot lie at [{raw_offset}, {raw_stop})")
        reach = raw_stop
        entries.append(Entry(fragment, raw_offset))
    return tuple(entries)


def _chunks(items: Iterator[list[Any]], raw_bytes: int) -> tuple[ChunkRecord, ...]:
    chunks: list[ChunkRecord] = []
    raw_position, file_position = 0, HEADER_BYTES
    for number, fields in enumerate(items):
        raw_offset, raw_size, file_offset, stored_size, codec, stored_digest, raw_digest = fields
        if _number(raw_offset) != raw_position or not 0 < _number(raw_size) <= MAX_CHUNK_BYTES:
            raise ValueError(f"chunk {number} cannot be raw bytes {raw_offset}+{raw_size}")
        if _number(file_offset) != align_frame(file_position) or not (
            0 < _number(stored_size) <= raw_size
        ):
            raise ValueError(f"chunk {number} cannot be stored at {file_offset}+{stored_size}")
        if _number(codec) not in CODECS:
            raise ValueError(f"chunk {number} has codec {codec}, known: {CODECS}")
        is_raw = codec == CODEC_RAW
        if is_raw != (raw_digest is None) or (is_raw and stored_size != raw_size):
            raise ValueError(f"chunk {number} is not stored as its codec says")
        _digest(stored_digest, DIGEST_BYTES)
        if raw_digest is not None:
            _digest(raw_digest, DIGEST_BYTES)
        chunks.append(ChunkRecord(*fields))
        raw_position += raw_size
        file_position = file_offset + stored_size
    if raw_position != raw_bytes:
        raise ValueError(f"chunks hold {raw_position} of {raw_bytes} raw bytes")
    return tuple(chunks)


def _number(value: object, limit: int = 2**62) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError(f"{value!r:.80} is not a number from 0 to {limit}")
    return value


def _text(value: object) -> str:
    if type(value) is not str:
        raise ValueError(f"{value!r:.80} is not text")
    return value


def _digest(value: object, size: int) -> bytes:
    if type(value) is not bytes or len(value) != size:
        raise ValueError(f"{value!r:.80} is not a digest of {size} bytes")
    return value


_READERS: dict[str, Callable[[object], Any]] = {
    "format": _text,
    "document": _text,
    "major": lambda value: _number(value, 2**16),
    "minor": lambda value: _number(value, 2**16),
    "ticket": lambda value: _digest(value, 32),
    "rank": lambda value: _number(value, 2**32),
    "world_size": lambda value: _number(value, 2**32),
    "raw_bytes": _number,
}


def _check_shape(shape: object) -> None:
    """Raise ValueError unless `shape` is a list of lengths whose product stays cheap."""
    if type(shape) is not list:
        raise ValueError(f"{shape!r:.80} is not a shape")
    total = 1
    for length in shape:
        total *= _number(length, MAX_ELEMENTS)
        if total > MAX_ELEMENTS:
            raise ValueError(f"shape {shape} has more than {MAX_ELEMENTS} elements")
