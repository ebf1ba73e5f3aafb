"""The raw stream of a shard: where every fragment lies in it, and how it is cut into chunks."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spotspeed.core.interval import Interval, overlaps
from spotspeed.core.layout import ITEM_BYTES, Fragment, TensorKey
from spotspeed.errors import InvalidLayoutError

if TYPE_CHECKING:
    from spotspeed.core.described import Described

ENTRY_ALIGNMENT = 8
"""Every entry begins at a multiple of this many bytes of the raw stream."""
PAGE_BYTES = 4096
SMALLEST_CHUNK_BYTES = 256 * 1024
LARGEST_CHUNK_BYTES = 4 * 1024 * 1024
MAX_CHUNK_BYTES = 16 * 1024 * 1024
"""The format's limit; a reader never needs more memory than this for one chunk."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A fragment's place in the raw stream: `fragment.size_bytes` bytes from `raw_offset`."""

    fragment: Fragment
    raw_offset: int

    @property
    def raw_stop(self) -> int:
        return self.raw_offset + self.fragment.size_bytes


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """One unit of digest and encoding; `item_bytes` is the width of the numbers in it."""

    index: int
    raw_offset: int
    size_bytes: int
    item_bytes: int

    @property
    def raw_stop(self) -> int:
        return self.raw_offset + self.size_bytes


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes of one entry in one chunk.

    `size_bytes` bytes from byte `source_offset` of entry `entry`'s fragment lie at byte
    `chunk_offset` of the chunk. Bytes of a chunk that no segment covers are zero.
    """

    entry: int
    source_offset: int
    chunk_offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StreamLayout:
    """Entries and chunks of one shard, both in order of the raw stream; chunks tile it.

    `sources[i]` is the position of `entries[i]`'s fragment in what `pack` was given. The first
    entries are those of `common`, where that is set.
    """

    entries: tuple[Entry, ...]
    chunks: tuple[ChunkSpan, ...]
    sources: tuple[int, ...]
    common: Described | None = field(default=None, compare=False, repr=False)

    @property
    def raw_bytes(self) -> int:
        """Length of the raw stream."""
        return self.chunks[-1].raw_stop if self.chunks else 0

    def segments(self, chunk: int) -> list[Segment]:
        """What chunk number `chunk` is made of, in order."""
        span = self.chunks[chunk]
        first = bisect_right(self.entries, span.raw_offset, key=lambda entry: entry.raw_offset)
        return list(self._segments(span, max(0, first - 1)))

    def _segments(self, span: ChunkSpan, first: int) -> Iterator[Segment]:
        for number in range(first, len(self.entries)):
            entry = self.entries[number]
            if entry.raw_offset >= span.raw_stop:
                return
            start = max(entry.raw_offset, span.raw_offset)
            stop = min(entry.raw_stop, span.raw_stop)
            if start < stop:
                yield Segment(
                    number, start - entry.raw_offset, start - span.raw_offset, stop - start
                )


def choose_chunk_bytes(total_bytes: int) -> int:
    """A chunk size for a shard of `total_bytes`: about 1/256 of it, 256 KiB to 4 MiB.

    A reader of another layout takes whole chunks, so at each end of what it needs it wastes half
    a chunk on average; 256 chunks keep that below a few percent, and 4 MiB amortises a request.
    """
    wanted = max(1, total_bytes // 256)
    power = 1 << (wanted - 1).bit_length()
    return min(max(power, SMALLEST_CHUNK_BYTES), LARGEST_CHUNK_BYTES)


def plane_bytes(dtype: str) -> int:
    """Width in bytes of the numbers of `dtype`; a complex number is two numbers."""
    return ITEM_BYTES[dtype] // (2 if dtype.startswith("complex") else 1)


def pack(fragments: Sequence[Fragment], *, chunk_bytes: int) -> StreamLayout:
    """Lay `fragments` out as one raw stream and cut it into chunks of `chunk_bytes`.

    Fragments of one dtype and kind form a section and keep their order, so that neighbours in the
    model are neighbours in the shard; sections follow each other in order of first appearance, and
    each starts a new chunk. Entries are 8-byte aligned; what lies between them is zero. Empty
    fragments of tensors that have elements are left out. Raises InvalidLayoutError when fragments
    overlap or disagree about their tensor, ValueError for a `chunk_bytes` that is no multiple of
    4096 up to 16 MiB.
    """
    if not 0 < chunk_bytes <= MAX_CHUNK_BYTES or chunk_bytes % PAGE_BYTES:
        raise ValueError(
            f"chunk_bytes {chunk_bytes}: a multiple of {PAGE_BYTES} up to {MAX_CHUNK_BYTES}"
        )
    check_disjoint(fragments)
    entries: list[Entry] = []
    chunks: list[ChunkSpan] = []
    sources: list[int] = []
    position = 0
    for dtype, members in _sections(fragments):
        section_start = position
        for source in members:
            entries.append(Entry(fragments[source], position))
            sources.append(source)
            position = _align(entries[-1].raw_stop)
        for start in range(section_start, position, chunk_bytes):
            size = min(chunk_bytes, position - start)
            chunks.append(ChunkSpan(len(chunks), start, size, plane_bytes(dtype)))
    return StreamLayout(tuple(entries), tuple(chunks), tuple(sources))


def pack_parts(
    fragments: Sequence[Fragment], counts: Sequence[int], *, chunk_bytes: int
) -> tuple[StreamLayout, ...]:
    """Layouts of several files, as `pack` makes them: one for each of `counts` fragments in turn.

    What is left of `fragments` is the last one's. Raises InvalidLayoutError for a count that is
    not positive or too large.
    """
    layouts: list[StreamLayout] = []
    position = 0
    for count in counts:
        if not 0 < count <= len(fragments) - position:
            raise InvalidLayoutError(f"a file of {count} of {len(fragments) - position} fragments")
        layouts.append(pack(fragments[position : position + count], chunk_bytes=chunk_bytes))
        position += count
    return (*layouts, pack(fragments[position:], chunk_bytes=chunk_bytes))


def join(parts: Sequence[StreamLayout], counts: Sequence[int]) -> StreamLayout:
    """The layouts of `pack_parts` one behind the other as one stream, for who only moves chunks."""
    head, *others = parts
    if not others:
        return head
    entries, chunks, sources = list(head.entries), list(head.chunks), list(head.sources)
    raw_base, source_base = head.raw_bytes, counts[0]
    for part, count in zip(others, [*counts[1:], 0], strict=True):
        chunk_base = len(chunks)
        entries += [Entry(item.fragment, raw_base + item.raw_offset) for item in part.entries]
        sources += [source_base + source for source in part.sources]
        chunks += [
            ChunkSpan(chunk_base + item.index, raw_base + item.raw_offset, item.size_bytes,
                      item.item_bytes)
            for item in part.chunks
        ]  # fmt: skip
        raw_base, source_base = raw_base + part.raw_bytes, source_base + count
    return StreamLayout(tuple(entries), tuple(chunks), tuple(sources))


def check_disjoint(fragments: Iterable[Fragment]) -> None:
    """Raise InvalidLayoutError if fragments overlap or disagree about a tensor's dtype or shape."""
    tensors: dict[TensorKey, Fragment] = {}
    intervals: dict[TensorKey, list[Interval]] = {}
    for fragment in fragments:
        first = tensors.setdefault(fragment.key, fragment)
        if (first.dtype, first.shape) != (fragment.dtype, fragment.shape):
            raise InvalidLayoutError(
                f"{fragment.key}: described as {first.dtype}{list(first.shape)} and as "
                f"{fragment.dtype}{list(fragment.shape)} in one shard"
            )
        intervals.setdefault(fragment.key, []).append(fragment.interval)
    for key, pieces in intervals.items():
        doubled = overlaps(pieces) if len(pieces) > 1 else []
        if doubled:
            raise InvalidLayoutError(
                f"{key}: elements [{doubled[0].start}, {doubled[0].stop}) are given twice"
            )


def _sections(fragments: Sequence[Fragment]) -> Iterator[tuple[str, list[int]]]:
    sections: dict[tuple[str, str], list[int]] = {}
    declared: set[TensorKey] = set()
    for number, fragment in enumerate(fragments):
        if fragment.interval.count == 0:
            if math.prod(fragment.shape) or fragment.key in declared:
                continue
            declared.add(fragment.key)
        sections.setdefault((fragment.dtype, fragment.key.kind), []).append(number)
    for (dtype, _), members in sections.items():
        yield dtype, members


def _align(offset: int) -> int:
    return -(-offset // ENTRY_ALIGNMENT) * ENTRY_ALIGNMENT
