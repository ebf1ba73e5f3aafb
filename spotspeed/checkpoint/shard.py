"""Writes one rank's shard: header, frames, index, footer, and then the receipt."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from types import TracebackType

from spotspeed.codec import RAW, Buffer, CodecPolicy, Frame, digest, encode
from spotspeed.core.chunks import StreamLayout
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
from spotspeed.core.index import ChunkRecord, ShardIndex, encode_index, parse_index
from spotspeed.core.manifest import Receipt, ShardRecord, Ticket, encode_receipt
from spotspeed.errors import CaptureError, FormatError
from spotspeed.storage.contract import Storage

_ZEROS = bytes(4096)


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk in its stored form; a raw frame's payload is the buffer it was made from."""

    index: int
    frame: Frame
    stored_digest: bytes
    raw_digest: bytes | None


class ShardWriter:
    """One shard being written: chunks in order of `layout.chunks`, then `finish`.

    A context manager; leaving it without `finish` discards what was written. `encode` may be
    called from any thread, everything else from one thread at a time. The files appear at
    `ticket.shard_path(rank)` and, once that is durable, `ticket.receipt_path(rank)`.
    """

    def __init__(
        self, storage: Storage, ticket: Ticket, rank: int, layout: StreamLayout,
        policy: CodecPolicy = RAW,
    ) -> None:  # fmt: skip
        if not 0 <= rank < ticket.world_size:
            raise ValueError(f"rank {rank} of {ticket.world_size}")
        self._storage = storage
        self._ticket = ticket
        self._rank = rank
        self._layout = layout
        self._policy = policy
        self._records: list[ChunkRecord] = []
        self._position = 0
        self._writer = storage.writer(ticket.shard_path(rank))
        try:
            self._write(encode_header(Header(ticket.digest, rank, ticket.world_size)))
        except BaseException:
            self._writer.abort()
            raise

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
        return EncodedChunk(index, frame, digest(frame.payload), raw_digest)

    def put(self, chunk: EncodedChunk) -> None:
        """Append an encoded chunk; it must be the next one. Its buffer is free on return."""
        if chunk.index != len(self._records):
            raise ValueError(f"chunk {chunk.index} was put, {len(self._records)} is next")
        self._pad()
        span = self._layout.chunks[chunk.index]
        record = ChunkRecord(
            span.raw_offset, span.size_bytes, self._position, len(chunk.frame.payload),
            chunk.frame.codec, chunk.stored_digest, chunk.raw_digest,
        )  # fmt: skip
        self._write(chunk.frame.payload)
        self._records.append(record)

    def put_chunk(self, index: int, buffer: Buffer) -> None:
        """Encode and append chunk `index`; the next one in order. `buffer` is free on return."""
        self.put(self.encode(index, buffer))

    def finish(self) -> Receipt:
        """Write index and footer, make the shard durable, then its receipt; return the receipt.

        Raises CaptureError when chunks are missing or something exceeds the format's limits.
        """
        missing = len(self._layout.chunks) - len(self._records)
        path = self._ticket.shard_path(self._rank)
        if missing:
            raise CaptureError(f"{path}: {missing} of {len(self._layout.chunks)} chunks were not "
                               f"put before the end")  # fmt: skip
        index = ShardIndex(
            self._ticket.digest, self._rank, self._ticket.world_size, self._layout.raw_bytes,
            self._layout.entries, tuple(self._records),
        )  # fmt: skip
        data = encode_index(index)
        try:
            parse_index(data, source=path)
        except FormatError as error:
            raise CaptureError(f"what is to be saved exceeds the format: {error}") from error
        self._pad()
        sha256 = hashlib.sha256(data)
        footer = Footer(self._position, len(data), sha256.digest())
        self._write(data)
        self._write(encode_footer(footer))
        self._writer.commit()
        shard = ShardRecord(
            path, footer.file_bytes, footer.index_offset, len(data), sha256.hexdigest(),
            self._layout.raw_bytes,
        )  # fmt: skip
        receipt = Receipt(self._ticket, self._rank, shard)
        self._storage.put(self._ticket.receipt_path(self._rank), encode_receipt(receipt))
        return receipt

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

    def _pad(self) -> None:
        gap = align_frame(self._position) - self._position
        if gap:
            self._write(_ZEROS[:gap])

    def _write(self, buffer: Buffer) -> None:
        self._writer.write(buffer)
        self._position += len(buffer)


def largest_file_bytes(layout: StreamLayout) -> int:
    """An upper bound of the shard's file size, from its layout: for admission and progress."""
    frames = sum(align_frame(chunk.size_bytes) for chunk in layout.chunks)
    names = sum(
        len(entry.fragment.key.name.encode()) + 160 + 9 * len(entry.fragment.shape)
        for entry in layout.entries
    )
    return HEADER_BYTES + frames + names + 96 * len(layout.chunks) + 1024 + FOOTER_BYTES
