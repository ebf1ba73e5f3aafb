"""The raw stream: sections, alignment, chunks that tile it, segments that fill them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotspeed.core.chunks import (
    LARGEST_CHUNK_BYTES,
    SMALLEST_CHUNK_BYTES,
    choose_chunk_bytes,
    join,
    pack,
    pack_parts,
    plane_bytes,
)
from spotspeed.core.interval import Interval
from spotspeed.core.layout import ITEM_BYTES, Fragment, TensorKey
from spotspeed.errors import InvalidLayoutError


def fragment(name, count, *, dtype="float32", kind="fp32", start=0, total=None):
    shape = (count + start if total is None else total,)
    return Fragment(TensorKey(kind, name), dtype, shape, Interval(start, start + count))


@st.composite
def fragment_lists(draw):
    result = []
    for number in range(draw(st.integers(0, 12))):
        dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
        kind = draw(st.sampled_from(["fp32", "exp_avg", "step"]))
        count, start = draw(st.integers(0, 3000)), draw(st.integers(0, 9))
        total = count + start + draw(st.integers(0, 5))
        result.append(fragment(f"p{number}", count, dtype=dtype, kind=kind, start=start,
                               total=total))  # fmt: skip
    return result


@settings(max_examples=200, deadline=None)
@given(fragment_lists(), st.sampled_from([4096, 8192, 12288]))
def test_chunks_tile_the_stream_and_segments_fill_them_exactly_once(fragments, chunk_bytes):
    layout = pack(fragments, chunk_bytes=chunk_bytes)
    position = 0
    for number, chunk in enumerate(layout.chunks):
        assert (chunk.index, chunk.raw_offset) == (number, position)
        assert 0 < chunk.size_bytes <= chunk_bytes and chunk.size_bytes % chunk.item_bytes == 0
        position = chunk.raw_stop
    assert position == layout.raw_bytes

    covered = np.zeros(layout.raw_bytes, np.int8)
    for entry in layout.entries:
        assert entry.raw_offset % 8 == 0
        covered[entry.raw_offset : entry.raw_stop] += 1
    assert covered.max(initial=0) <= 1

    filled = np.zeros(layout.raw_bytes, np.int8)
    for chunk in layout.chunks:
        for part in layout.segments(chunk.index):
            start = chunk.raw_offset + part.chunk_offset
            entry = layout.entries[part.entry]
            assert start == entry.raw_offset + part.source_offset
            assert part.chunk_offset + part.size_bytes <= chunk.size_bytes
            assert chunk.item_bytes == plane_bytes(entry.fragment.dtype)
            filled[start : start + part.size_bytes] += 1
    assert np.array_equal(filled, covered)


@settings(max_examples=100, deadline=None)
@given(fragment_lists())
def test_every_fragment_with_elements_has_one_entry_and_its_source_is_known(fragments):
    layout = pack(fragments, chunk_bytes=4096)
    assert [fragments[source] for source in layout.sources] == [
        entry.fragment for entry in layout.entries
    ]
    assert len(set(layout.sources)) == len(layout.sources)
    expected = {number for number, item in enumerate(fragments)
                if item.interval.count or 0 in item.shape}  # fmt: skip
    assert set(layout.sources) == expected


def test_a_section_keeps_the_order_it_was_given_and_starts_a_new_chunk():
    fragments = [
        fragment("layers.2", 10), fragment("layers.2", 10, kind="exp_avg"),
        fragment("layers.10", 10), fragment("layers.10", 10, kind="exp_avg"),
    ]  # fmt: skip
    layout = pack(fragments, chunk_bytes=4096)
    assert layout.sources == (0, 2, 1, 3)
    assert [chunk.raw_offset for chunk in layout.chunks] == [0, 80]


def test_small_fragments_share_a_chunk_and_large_ones_are_cut():
    layout = pack([fragment(f"p{n}", 3) for n in range(100)], chunk_bytes=4096)
    assert [chunk.size_bytes for chunk in layout.chunks] == [1600]
    layout = pack([fragment("p", 5000)], chunk_bytes=4096)
    assert [chunk.size_bytes for chunk in layout.chunks] == [4096] * 4 + [3616]


def test_an_empty_share_is_left_out_but_an_empty_tensor_is_declared_once():
    empty = Fragment(TensorKey("weight", "e"), "float32", (0, 4), Interval(0, 0))
    share = Fragment(TensorKey("weight", "s"), "float32", (4,), Interval(4, 4))
    layout = pack([empty, share, empty], chunk_bytes=4096)
    assert [entry.fragment for entry in layout.entries] == [empty]
    assert layout.chunks == () and layout.raw_bytes == 0


def test_overlap_and_contradiction_are_refused_by_name():
    with pytest.raises(InvalidLayoutError, match=r"fp32:p: elements \[5, 10\) are given twice"):
        pack([fragment("p", 10, total=20), fragment("p", 10, start=5, total=20)], chunk_bytes=4096)
    with pytest.raises(InvalidLayoutError, match="fp32:p: described as float32"):
        pack([fragment("p", 10), fragment("p", 0, dtype="int8", start=10)], chunk_bytes=4096)


@pytest.mark.parametrize("chunk_bytes", [0, -4096, 1000, 4097, 32 << 20])
def test_a_chunk_size_that_the_format_does_not_have_is_refused(chunk_bytes):
    with pytest.raises(ValueError, match="chunk_bytes"):
        pack([], chunk_bytes=chunk_bytes)


def test_the_chunk_size_grows_with_the_shard_within_its_bounds():
    sizes = [choose_chunk_bytes(1 << bits) for bits in range(45)]
    assert sizes == sorted(sizes)
    assert sizes[0] == choose_chunk_bytes(0) == SMALLEST_CHUNK_BYTES
    assert sizes[-1] == LARGEST_CHUNK_BYTES
    assert choose_chunk_bytes(300 << 20) == 2 << 20


def test_the_parts_of_a_save_joined_carry_every_byte_of_each_part():
    fragments = [
        Fragment(TensorKey("weight", f"w{n}"), dtype, (size,), Interval(0, size))
        for n, (dtype, size) in enumerate([("bfloat16", 3001), ("float32", 900), ("bfloat16", 5),
                                           ("float32", 2500), ("uint8", 77)])
    ]  # fmt: skip
    parts = pack_parts(fragments, [2, 1], chunk_bytes=4096)
    assert [len(part.entries) for part in parts] == [2, 1, 2]
    joined = join(parts, [2, 1])
    assert joined.raw_bytes == sum(part.raw_bytes for part in parts)
    base = 0
    flat = [
        (number, index) for number, part in enumerate(parts) for index in range(len(part.chunks))
    ]
    for chunk, (number, index) in enumerate(flat):
        part = parts[number]
        assert joined.chunks[chunk].index == chunk
        assert joined.chunks[chunk].size_bytes == part.chunks[index].size_bytes
        source_base = [0, 2, 3][number]
        one = [(joined.sources[s.entry], s.source_offset, s.chunk_offset, s.size_bytes)
               for s in joined.segments(chunk)]  # fmt: skip
        other = [(source_base + part.sources[s.entry], s.source_offset, s.chunk_offset,
                  s.size_bytes) for s in part.segments(index)]  # fmt: skip
        assert one == other
        base += part.chunks[index].size_bytes
    assert base == joined.raw_bytes
    for counts in ([0], [6], [3, 3], [-1]):
        with pytest.raises(InvalidLayoutError):
            pack_parts(fragments, counts, chunk_bytes=4096)
