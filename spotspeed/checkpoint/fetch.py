"""Turns the transfers of a read plan into few large verified reads."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from spotspeed.checkpoint.near import Near
from spotspeed.checkpoint.sealed import OpenShard, listed, place
from spotspeed.codec import check_digest, decode
from spotspeed.core.format import CODEC_RAW, FRAME_ALIGNMENT
from spotspeed.core.index import ChunkRecord
from spotspeed.core.reshard import Transfer
from spotspeed.errors import FormatError
from spotspeed.storage.contract import Storage

SPAN_BYTES = 8 * 1024 * 1024
"""Most bytes of one read, unless a single chunk is larger."""
DIRECT_BYTES = 4 * 1024 * 1024
"""A run of raw chunks is read straight into its target from this size on; shorter ones are copied,
so that they can share a read with their neighbours."""

_ZEROS = bytes(FRAME_ALIGNMENT)
_thread = threading.local()


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes [start, stop) of a decoded chunk that go to byte `target_offset` of a request."""

    start: int
    stop: int
    request: int
    target_offset: int


@dataclass(frozen=True, slots=True)
class WantedChunk:
    """One chunk of a shard, and where its bytes go."""

    number: int
    record: ChunkRecord
    parts: tuple[Part, ...]

    @property
    def fills_one_part(self) -> bool:
        """Whether the whole chunk goes to one place."""
        return len(self.parts) == 1 and (
            self.parts[0].stop - self.parts[0].start == self.record.raw_size
        )

    def continues(self, last: WantedChunk) -> bool:
        """Whether this chunk directly follows `last`, in the file and in their common target."""
        return (
            self.record.file_offset == last.record.file_stop
            and self.parts[0].request == last.parts[0].request
            and self.parts[0].target_offset == last.parts[0].target_offset + last.record.raw_size
        )


@dataclass(frozen=True, slots=True)
class Span:
    """One read of consecutive chunks; `is_direct` when it goes straight to its target."""

    shard: OpenShard
    chunks: tuple[WantedChunk, ...]
    is_direct: bool

    @property
    def file_offset(self) -> int:
        return self.chunks[0].record.file_offset

    @property
    def size_bytes(self) -> int:
        return self.chunks[-1].record.file_stop - self.file_offset


def plan_spans(shard: OpenShard, transfers: Sequence[Transfer]) -> list[Span]:
    """The reads that serve `transfers` (all of this shard, in order of place)."""
    spans: list[Span] = []
    waiting: list[WantedChunk] = []
    for run in _runs(_wanted_chunks(shard, transfers)):
        size = run[-1].record.file_stop - run[0].record.file_offset
        if run[0].fills_one_part and run[0].record.codec == CODEC_RAW and size >= DIRECT_BYTES:
            spans += _cut(shard, waiting, is_direct=False)
            waiting = []
            spans += _cut(shard, run, is_direct=True)
        else:
            waiting += run
    return spans + _cut(shard, waiting, is_direct=False)


def fetch(
    storage: Storage, span: Span, targets: Sequence[memoryview], near: Near | None = None
) -> int:
    """Read, verify and deliver one span; returns the bytes read.

    A chunk that `near` has right comes from there. Raises CorruptionError naming the file;
    targets may then hold damaged bytes.
    """
    source = place(storage, span.shard.path)
    first = span.chunks[0].parts[0]
    if span.is_direct:
        buffer = targets[first.request][first.target_offset :][: span.size_bytes]
    else:
        buffer = scratch(span.size_bytes)
    everything = range(len(span.chunks))
    missing = everything if near is None else near.read(span.shard.path, span.chunks, buffer)
    is_far = len(missing) == len(everything)
    if is_far:
        with listed(storage, span.shard.path):
            storage.read_into(span.shard.path, span.file_offset, buffer)
    reach = 0
    for position, chunk in enumerate(span.chunks):
        record, key = chunk.record, f"{source}#chunk {chunk.number}"
        offset = record.file_offset - span.file_offset
        frame = buffer[offset : offset + record.stored_size]
        if is_far:
            check_padding(buffer[reach:offset], f"{source}: before chunk {chunk.number}")
        elif position in missing:
            with listed(storage, span.shard.path):
                storage.read_into(span.shard.path, record.file_offset, frame)
        reach = offset + record.stored_size
        if position in missing:
            check_digest(frame, record.stored_digest, key=key)
        if not span.is_direct:
            _deliver(frame, chunk, targets, key)
    return span.size_bytes


def unpack(frame: memoryview, record: ChunkRecord, out: memoryview, *, key: str) -> None:
    """Decode a verified frame into `out` and verify the result; raises CorruptionError."""
    decode(record.codec, frame, out, key=key)
    if record.raw_digest is not None:
        check_digest(out, record.raw_digest, key=f"{key} (decoded)")


def check_padding(gap: memoryview, where: str) -> None:
    """Raise FormatError unless `gap`, less than a page between two frames, is zero."""
    if gap != _ZEROS[: len(gap)]:
        raise FormatError(f"{where}: the padding is not zero")


def _deliver(
    frame: memoryview, chunk: WantedChunk, targets: Sequence[memoryview], key: str
) -> None:
    record, parts = chunk.record, chunk.parts
    if record.codec == CODEC_RAW:
        raw = frame
    elif chunk.fills_one_part:
        target = targets[parts[0].request][parts[0].target_offset :][: record.raw_size]
        unpack(frame, record, target, key=key)
        return
    else:
        raw = memoryview(bytearray(record.raw_size))
        unpack(frame, record, raw, key=key)
    for part in parts:
        size = part.stop - part.start
        targets[part.request][part.target_offset : part.target_offset + size] = (
            raw[part.start : part.stop]
        )  # fmt: skip


def _wanted_chunks(shard: OpenShard, transfers: Sequence[Transfer]) -> list[WantedChunk]:
    chunks = shard.index.chunks
    parts: dict[int, list[Part]] = {}
    for transfer in transfers:
        position, stop = transfer.raw_offset, transfer.raw_offset + transfer.size_bytes
        if stop > shard.index.raw_bytes:
            raise FormatError(f"{shard.path}: bytes up to {stop} wanted of {shard.index.raw_bytes}")
        number = bisect_right(chunks, position, key=lambda chunk: chunk.raw_offset) - 1
        while position < stop:
            record = chunks[number]
            until = min(stop, record.raw_stop)
            target = transfer.target_offset + position - transfer.raw_offset
            parts.setdefault(number, []).append(
                Part(position - record.raw_offset, until - record.raw_offset,
                     transfer.request, target)
            )  # fmt: skip
            position, number = until, number + 1
    return [WantedChunk(number, chunks[number], tuple(parts[number])) for number in sorted(parts)]


def _runs(chunks: Sequence[WantedChunk]) -> list[list[WantedChunk]]:
    """Neighbouring raw chunks with one common target together, every other chunk alone."""
    runs: list[list[WantedChunk]] = []
    for chunk in chunks:
        last = runs[-1][-1] if runs else None
        if last is not None and _is_plain(last) and _is_plain(chunk) and chunk.continues(last):
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    return runs


def _is_plain(chunk: WantedChunk) -> bool:
    return chunk.fills_one_part and chunk.record.codec == CODEC_RAW


def _cut(shard: OpenShard, chunks: Sequence[WantedChunk], *, is_direct: bool) -> list[Span]:
    """Spans of neighbouring chunks, each of at most SPAN_BYTES."""
    spans: list[Span] = []
    group: list[WantedChunk] = []
    for chunk in chunks:
        if group and (
            chunk.number != group[-1].number + 1
            or chunk.record.file_stop - group[0].record.file_offset > SPAN_BYTES
        ):
            spans.append(Span(shard, tuple(group), is_direct))
            group = []
        group.append(chunk)
    if group:
        spans.append(Span(shard, tuple(group), is_direct))
    return spans


def scratch(size_bytes: int) -> memoryview:
    """This thread's reading buffer; what it held before is gone."""
    buffer: bytearray | None = getattr(_thread, "buffer", None)
    if buffer is None or len(buffer) < size_bytes:
        buffer = _thread.buffer = bytearray(max(size_bytes, SPAN_BYTES))
    return memoryview(buffer)[:size_bytes]
