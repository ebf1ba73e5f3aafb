"""Writes one rank's shard: header, frames, index, footer, and then the receipt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Protocol

from spotspeed.codec import (
    RAW,
    Buffer,
    CodecPolicy,
    Frame,
    check_digest,
    digest,
    encode,
    hasher,
)
from spotspeed.core.chunks import StreamLayout
from spotspeed.core.coverage import coverage, total
from spotspeed.core.format import (
    CODEC_RAW,
    FOOTER_BYTES,
    HEADER_BYTES,
    Footer,
    Header,
    align_frame,
    encode_footer,
    encode_header,
)
from spotspeed.core.frozen import ObjectRecord, content_of, object_path
from spotspeed.core.index import MAX_INDEX_BYTES, ChunkRecord, ShardIndex, encode_index, parse_index
from spotspeed.core.manifest import (
    MAX_RECEIPT_BYTES,
    Receipt,
    ShardRecord,
    Ticket,
    encode_receipt,
)
from spotspeed.errors import CaptureError, FormatError, StorageError
from spotspeed.storage.contract import Writer

_ZEROS = bytes(4096)
ReadBack = Callable[[int, memoryview], None]
"""Fills the buffer from that byte of a shard being written."""


class Sink(Protocol):
    """What is needed of a store; see storage.contract.Storage."""

    def writer(self, key: str) -> Writer: ...

    def put(self, key: str, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk in its stored form; a raw frame's payload is the buffer it was made from."""

    index: int
    frame: Frame
    stored_digest: bytes
    raw_digest: bytes | None
    raw: Buffer = field(default=b"", repr=False)
    """The buffer it was made from."""


class ShardWriter:
    """One shard being written: chunks in order of `layout.chunks`, then `finish`.

    A context manager; leaving it without `finish` discards what was written. `encode` may be
    called from any thread, everything else from one thread at a time. The files appear at
    `ticket.shard_path(rank)` and, once that is durable, `ticket.receipt_path(rank)`.
    """

    def __init__(
        self, storage: Sink, ticket: Ticket, rank: int, layout: StreamLayout,
        policy: CodecPolicy = RAW, *, content: str | None = None,
    ) -> None:  # fmt: skip
        """With `content` it is a frozen object that holds exactly that (core/frozen.py)."""
        if not 0 <= rank < ticket.world_size:
            raise ValueError(f"rank {rank} of {ticket.world_size}")
        self._storage = storage
        self._ticket = ticket
        self._rank = rank
        self._layout = layout
        self._policy = policy
        self._content = content
        self._path = (ticket.shard_path(rank) if content is None
                      else object_path(ticket.directory, content))  # fmt: skip
        self._identity = ((ticket.digest, rank, ticket.world_size) if content is None
                          else (bytes.fromhex(content), 0, 1))  # fmt: skip
        self._hashers = [] if content is None else [hasher() for _ in layout.entries]
        self._records: list[ChunkRecord] = []
        self._position = 0
        self._writer: Writer
        self._begin()

    @property
    def layout(self) -> StreamLayout:
        """What the file holds and how it is cut into chunks."""
        return self._layout

    @property
    def chunks_put(self) -> int:
        """How many chunks have been put; the index of the next one."""
        return len(self._records)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the file so far."""
        return self._position

    def encode(self, index: int, buffer: Buffer) -> EncodedChunk:
        """Digest and encode chunk `index`, whose raw bytes are `buffer`, without writing it.

        `buffer` may not change until the result has been put. Raises ValueError when its size is
        not the layout's.
        """
        span = self._layout.chunks[index]
        if len(buffer) != span.size_bytes:
            raise ValueError(f"chunk {index} has {span.size_bytes} bytes, given {len(buffer)}")
        frame = encode(buffer, span.item_bytes, self._policy)
        raw_digest = None if frame.codec == CODEC_RAW else digest(buffer)
        return EncodedChunk(index, frame, digest(frame.payload), raw_digest, buffer)

    def encode_all(self, first: int, buffers: Sequence[Buffer]) -> list[EncodedChunk]:
        """`encode` of the chunks from `first` on."""
        return [self.encode(index, buffer) for index, buffer in enumerate(buffers, first)]

    def put_all(self, chunks: Sequence[EncodedChunk]) -> None:
        """Append encoded chunks, which must be the next ones. Their buffers are free on return."""
        buffers: list[Buffer] = []
        records: list[ChunkRecord] = []
        position = self._position
        for number, chunk in enumerate(chunks, len(self._records)):
            if chunk.index != number:
                raise ValueError(f"chunk {chunk.index} was put, {number} is next")
            start, payload = align_frame(position), chunk.frame.payload
            buffers += (_ZEROS[: start - position], payload) if start > position else (payload,)
            span = self._layout.chunks[chunk.index]
            records.append(ChunkRecord(
                span.raw_offset, span.size_bytes, start, len(payload),
                chunk.frame.codec, chunk.stored_digest, chunk.raw_digest,
            ))  # fmt: skip
            position = start + len(payload)
        self._write(*buffers)
        self._records += records
        for chunk in chunks if self._hashers else ():
            raw = memoryview(chunk.raw)
            for part in self._layout.segments(chunk.index):
                data = raw[part.chunk_offset : part.chunk_offset + part.size_bytes]
                self._hashers[part.entry].update(data)

    def put_chunk(self, index: int, buffer: Buffer) -> None:
        """Encode and append chunk `index`; the next one in order. `buffer` is free on return."""
        self.put_all((self.encode(index, buffer),))

    def finish(self, objects: Sequence[ObjectRecord] = ()) -> Receipt:
        """Write index and footer, make the shard durable, then its receipt; return the receipt.

        `objects` are the frozen objects that hold the rest of this rank's part, all durable.
        Raises CaptureError when chunks are missing or something exceeds the format's limits.
        """
        shard = self._close()
        numbers = [self._coverage(), *(item.coverage for item in objects)]
        receipt = Receipt(self._ticket, self._rank, shard, total(numbers), tuple(objects))
        data = encode_receipt(receipt)
        if len(data) > MAX_RECEIPT_BYTES:
            raise CaptureError(f"{self._path}: refers to {len(objects)} objects, too many for a "
                               f"receipt")  # fmt: skip
        self._storage.put(self._ticket.receipt_path(self._rank), data)
        return receipt

    def finish_object(self) -> ObjectRecord:
        """Write index and footer of a frozen object and make it durable.

        Raises CaptureError when what was put is not the content it was announced with.
        """
        layout = self._layout
        members = {
            source: (entry.fragment, hashed.digest())
            for source, entry, hashed in zip(
                layout.sources, layout.entries, self._hashers, strict=True
            )
        }
        found = content_of(members[source] for source in sorted(members))
        if found != self._content:
            raise CaptureError(
                f"{self._path}: frozen weights were changed while they were being staged, so this "
                f"save is not one step's state"
            )
        return ObjectRecord(content=found, coverage=self._coverage(), **asdict(self._close()))

    def _coverage(self) -> str:
        common, entries = self._layout.common, self._layout.entries
        if common is None:
            return coverage(entry.fragment for entry in entries)
        rest = coverage(entry.fragment for entry in entries[common.entry_count :])
        return total((common.coverage, rest))

    def _close(self) -> ShardRecord:
        """Write index and footer, and make the file durable."""
        missing = len(self._layout.chunks) - len(self._records)
        if missing:
            raise CaptureError(f"{self._path}: {missing} of {len(self._layout.chunks)} chunks were "
                               f"not put before the end")  # fmt: skip
        index = ShardIndex(
            *self._identity, self._layout.raw_bytes, self._layout.entries, tuple(self._records)
        )
        data = encode_index(index)
        self._check(index, data)
        self._pad()
        sha256 = hashlib.sha256(data)
        footer = Footer(self._position, len(data), sha256.digest())
        self._write(data)
        self._write(encode_footer(footer))
        self._writer.commit()
        return ShardRecord(
            self._path, footer.file_bytes, footer.index_offset, len(data), sha256.hexdigest(),
            self._layout.raw_bytes,
        )  # fmt: skip

    def _check(self, index: ShardIndex, data: bytes) -> None:
        """Raise CaptureError unless `data`, the stored form of `index`, can be read back."""
        common = self._layout.common
        try:
            if common is not None and common.is_storable and len(data) <= MAX_INDEX_BYTES:
                # Its entries are not read again for every save: the rest stands for itself.
                data = encode_index(replace(index, entries=index.entries[common.entry_count :]))
            parse_index(data, source=self._path)
        except FormatError as error:
            raise CaptureError(f"what is to be saved exceeds the format: {error}") from error

    def move(self, storage: Sink, read_back: ReadBack) -> None:
        """Go on in `storage`: every chunk put so far is read back, verified and written there.

        For a store that has failed in `put` or `finish`, which are then to be called again. Raises
        CorruptionError when what is read back is damaged, StorageError when `storage` fails too.
        """
        self._writer.abort()
        self._storage, self._position = storage, 0
        self._begin()
        for number, record in enumerate(self._records):
            frame = memoryview(bytearray(record.stored_size))
            read_back(record.file_offset, frame)
            key = f"{self._path}#chunk {number}, being moved"
            check_digest(frame, record.stored_digest, key=key)
            self._pad()
            self._write(frame)

    def abort(self) -> None:
        """Discard what was written; harmless after `finish`."""
        self._writer.abort()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._writer.abort()

    def _begin(self) -> None:
        """Open the file of the shard, and write its header."""
        self._writer = self._storage.writer(self._path)
        try:
            self._write(encode_header(Header(*self._identity)))
        except BaseException:
            self._writer.abort()
            raise

    def _pad(self) -> None:
        gap = align_frame(self._position) - self._position
        if gap:
            self._write(_ZEROS[:gap])

    def _write(self, *buffers: Buffer) -> None:
        try:
            self._writer.write_all(buffers)
        except StorageError as error:
            left = largest_file_bytes(self._layout) - self._position
            raise type(error)(f"{error} (up to {left} bytes of this file are missing)") from error
        self._position += sum(map(len, buffers))


def largest_file_bytes(layout: StreamLayout) -> int:
    """An upper bound of the shard's file size, from its layout: for admission and progress."""
    frames = sum(align_frame(chunk.size_bytes) for chunk in layout.chunks)
    names = sum(
        len(entry.fragment.key.name.encode()) + 160 + 9 * len(entry.fragment.shape)
        for entry in layout.entries
    )
    return HEADER_BYTES + frames + names + 96 * len(layout.chunks) + 1024 + FOOTER_BYTES
