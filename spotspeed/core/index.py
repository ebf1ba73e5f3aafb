"""The index of a shard: its entries and chunks as msgpack, parsed within strict bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from spotspeed.core.chunks import ENTRY_ALIGNMENT, MAX_CHUNK_BYTES, Entry
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
from spotspeed.core.manifest import FORMAT_MAJOR, FORMAT_MINOR, FORMAT_NAME
from spotspeed.errors import FormatError, InvalidLayoutError

MAX_INDEX_BYTES = 64 * 1024 * 1024
MAX_NAME_BYTES = 4096
MAX_DIMENSIONS = 32
MAX_ELEMENTS = 2**60
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
    minor: int = FORMAT_MINOR

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

    Only scalars are ever built from unknown bytes, and lists are read one checked item at a time,
    so hostile input costs no more memory than a small multiple of its size.
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
    """Reads one index from front to back; every problem is ValueError or FormatError."""

    def __init__(self, data: bytes, source: str) -> None:
        self._source = source
        self._size = len(data)
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=max(1, len(data)), max_str_len=MAX_NAME_BYTES, max_bin_len=64,
            max_array_len=0, max_map_len=0, max_ext_len=0, strict_map_key=True,
        )  # fmt: skip
        self._unpacker.feed(data)

    def index(self) -> ShardIndex:
        fields: dict[str, Any] = {}
        for _ in range(self._count(self._unpacker.read_map_header, 64)):
            key = self._text()
            if key in fields:
                raise ValueError(f"{key!r} is there twice")
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
            value = _READERS[key](self)
            if key == "major":
                check_major(value, "x", self._source)
            return value
        if key not in ("entries", "chunks"):
            if fields.get("minor", 0) <= FORMAT_MINOR:
                raise ValueError(f"unknown key {key!r}")
            self._unpacker.skip()
            return None
        if "raw_bytes" not in fields:
            raise ValueError(f"raw_bytes must come before {key}")
        return self._entries(fields) if key == "entries" else self._chunks(fields)

    def _entries(self, fields: dict[str, Any]) -> tuple[Entry, ...]:
        entries: list[Entry] = []
        reach, raw_bytes = 0, fields["raw_bytes"]
        for _ in range(self._count(self._unpacker.read_array_header, self._size)):
            self._exactly(_ENTRY_FIELDS)
            key = TensorKey(self._text(), self._text(), self._text())
            dtype = self._text()
            shape = tuple(
                self._number(MAX_ELEMENTS)
                for _ in range(self._count(self._unpacker.read_array_header, MAX_DIMENSIONS))
            )
            start, stop, raw_offset = (self._number(MAX_ELEMENTS) for _ in range(3))
            _check_elements(shape)
            entry = Entry(Fragment(key, dtype, shape, Interval(start, stop)), raw_offset)
            if raw_offset % ENTRY_ALIGNMENT or raw_offset < reach or entry.raw_stop > raw_bytes:
                raise ValueError(f"{key} cannot lie at [{raw_offset}, {entry.raw_stop})")
            reach = entry.raw_stop
            entries.append(entry)
        return tuple(entries)

    def _chunks(self, fields: dict[str, Any]) -> tuple[ChunkRecord, ...]:
        chunks: list[ChunkRecord] = []
        raw_position, file_position = 0, HEADER_BYTES
        for _ in range(self._count(self._unpacker.read_array_header, self._size)):
            self._exactly(_CHUNK_FIELDS)
            raw_offset, raw_size, file_offset, stored_size, codec = (
                self._number(2**62) for _ in range(5)
            )
            stored_digest, raw_digest = self._digest(), self._optional_digest()
            if raw_offset != raw_position or not 0 < raw_size <= MAX_CHUNK_BYTES:
                raise ValueError(f"chunk {len(chunks)} cannot be raw bytes {raw_offset}+{raw_size}")
            if file_offset != align_frame(file_position) or not 0 < stored_size <= raw_size:
                raise ValueError(f"chunk {len(chunks)} cannot be stored at {file_offset}"
                                 f"+{stored_size}")  # fmt: skip
            if codec not in CODECS:
                raise ValueError(f"chunk {len(chunks)} has codec {codec}, known: {CODECS}")
            is_raw = codec == CODEC_RAW
            if is_raw != (raw_digest is None) or (is_raw and stored_size != raw_size):
                raise ValueError(f"chunk {len(chunks)} is not stored as its codec says")
            chunk = ChunkRecord(
                raw_offset, raw_size, file_offset, stored_size, codec, stored_digest, raw_digest
            )
            chunks.append(chunk)
            raw_position, file_position = chunk.raw_stop, chunk.file_stop
        if raw_position != fields["raw_bytes"]:
            raise ValueError(f"chunks hold {raw_position} of {fields['raw_bytes']} raw bytes")
        return tuple(chunks)

    def _count(self, read: Callable[[], Any], limit: int) -> int:
        count = int(read())
        if not 0 <= count <= limit:
            raise ValueError(f"a list of {count} items, at most {limit} are possible")
        return count

    def _exactly(self, count: int) -> None:
        found = self._unpacker.read_array_header()
        if found != count:
            raise ValueError(f"an item of {found} fields, expected {count}")

    def _number(self, limit: int) -> int:
        value = self._unpacker.unpack()
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
            raise ValueError(f"{value!r} is not a number from 0 to {limit}")
        return value

    def _text(self) -> str:
        value = self._unpacker.unpack()
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is not text")
        return value

    def _digest(self, size: int = DIGEST_BYTES) -> bytes:
        value = self._optional_digest(size)
        if value is None:
            raise ValueError("a digest is missing")
        return value

    def _optional_digest(self, size: int = DIGEST_BYTES) -> bytes | None:
        value = self._unpacker.unpack()
        if value is not None and (not isinstance(value, bytes) or len(value) != size):
            raise ValueError(f"{value!r} is not a digest of {size} bytes")
        return value


_READERS: dict[str, Callable[[_Parser], Any]] = {
    "format": _Parser._text,
    "document": _Parser._text,
    "major": lambda parser: parser._number(2**16),
    "minor": lambda parser: parser._number(2**16),
    "ticket": lambda parser: parser._digest(32),
    "rank": lambda parser: parser._number(2**32),
    "world_size": lambda parser: parser._number(2**32),
    "raw_bytes": lambda parser: parser._number(2**62),
}


def _check_elements(shape: tuple[int, ...]) -> None:
    """Keep the product of `shape` small, so that arithmetic on it stays cheap."""
    total = 1
    for length in shape:
        total *= length
        if total > MAX_ELEMENTS:
            raise ValueError(f"shape {shape} has more than {MAX_ELEMENTS} elements")
