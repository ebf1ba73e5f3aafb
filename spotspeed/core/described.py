"""The fragments that one save after another has in common, laid out once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from spotspeed.core.chunks import StreamLayout, join, pack, pack_parts
from spotspeed.core.coverage import coverage
from spotspeed.core.format import CODEC_RAW, DIGEST_BYTES, HEADER_BYTES, align_frame
from spotspeed.core.index import ChunkRecord, ShardIndex, encode_index, parse_index
from spotspeed.core.layout import KIND_BLOB, Fragment


@dataclass(frozen=True, eq=False)
class Described:
    """Fragments with their layout in chunks of `chunk_bytes`; `kinds` are those of their keys.

    What costs a pass over all of them is found out once, when it is first asked for.
    """

    fragments: tuple[Fragment, ...]
    chunk_bytes: int
    layout: StreamLayout
    kinds: frozenset[str]

    @classmethod
    def of(cls, fragments: Sequence[Fragment], *, chunk_bytes: int) -> Described:
        """Lay `fragments` out; raises what `core.chunks.pack` does."""
        layout = pack(fragments, chunk_bytes=chunk_bytes)
        kinds = frozenset(fragment.key.kind for fragment in fragments)
        return cls(tuple(fragments), chunk_bytes, layout, kinds)

    @property
    def entry_count(self) -> int:
        return len(self.layout.entries)

    @cached_property
    def coverage(self) -> str:
        """Their number of `core.coverage`."""
        return coverage(entry.fragment for entry in self.layout.entries)

    @cached_property
    def is_storable(self) -> bool:
        """True; raises FormatError for names, shapes or ranges that the format does not take."""
        layout = self.layout
        chunks, position = [], HEADER_BYTES
        for span in layout.chunks:
            start = align_frame(position)
            position = start + span.size_bytes
            chunks.append(ChunkRecord(span.raw_offset, span.size_bytes, start, span.size_bytes,
                                      CODEC_RAW, bytes(DIGEST_BYTES), None))  # fmt: skip
        index = ShardIndex(bytes(32), 0, 1, layout.raw_bytes, layout.entries, tuple(chunks))
        parse_index(encode_index(index), source="what is to be saved")
        return True

    def extend(self, more: Sequence[Fragment]) -> tuple[StreamLayout, ...]:
        """Layouts that, joined, are what `pack` makes of these fragments and `more` behind them.

        Other kinds are other sections and other tensors, so nothing before them changes; where
        `more` has a kind of these, all is laid out anew as one. Raises what `pack` does.
        """
        if any(fragment.key.kind in self.kinds for fragment in more):
            return (pack([*self.fragments, *more], chunk_bytes=self.chunk_bytes),)
        return self.layout, pack(more, chunk_bytes=self.chunk_bytes)

    def shard(self, parts: Sequence[StreamLayout]) -> StreamLayout:
        """The layout of what `extend` gave, which remembers what it has in common with others."""
        if len(parts) == 1:
            return parts[0]
        return replace(join(parts, [len(self.fragments)]), common=self)


def lay_out(
    described: Described, fragments: Sequence[Fragment], counts: Sequence[int]
) -> tuple[StreamLayout, ...]:
    """Layouts of the files of a save: objects of `counts` of the `fragments` each, and the shard.

    The shard has what is described, then what is left of `fragments`. Raises InvalidLayoutError
    for counts that do not fit, and what `core.chunks.pack` raises.
    """
    rest = sum(counts)
    objects = pack_parts(fragments[:rest], counts, chunk_bytes=described.chunk_bytes)[:-1]
    tail = fragments[rest:]
    shard = described.extend(tail)
    return (*objects, described.shard(shard))


def common_count(fragments: Sequence[Fragment]) -> int:
    """How many of `fragments` the next save is likely to have too: all before the last blobs."""
    count = len(fragments)
    while count and fragments[count - 1].key.kind == KIND_BLOB:
        count -= 1
    return count
