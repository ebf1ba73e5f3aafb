"""Every wanted byte is planned exactly once, whatever number of ranks wrote and reads."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotspeed.core.chunks import Entry, pack
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Extent, Fragment, Holding, StoredTensor, TensorKey
from spotspeed.core.reshard import gather, plan_reads, uncovered
from spotspeed.errors import InvalidLayoutError

KINDS = ("fp32", "exp_avg")

shapes = st.lists(
    st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=8
)  # fmt: skip


def model(shape_list):
    return {TensorKey(kind, f"p{n}"): shape
            for kind in KINDS for n, shape in enumerate(shape_list)}  # fmt: skip


def whole(key, shape):
    return Fragment(key, "float32", shape, Interval(0, math.prod(shape)))


def zero_partition(tensors, world_size, rank):
    """ZeRO-1/2: one flat buffer per kind, cut into equal parts."""
    fragments = []
    for kind in KINDS:
        members = [(key, shape) for key, shape in tensors.items() if key.kind == kind]
        part = Interval(0, sum(math.prod(shape) for _, shape in members)).split(world_size, rank)
        position = 0
        for key, shape in members:
            held = part.intersect(Interval(position, position + math.prod(shape)))
            inside = held.shift(-position) if held else Interval(0, 0)
            fragments.append(Fragment(key, "float32", shape, inside))
            position += math.prod(shape)
    return fragments


def per_tensor(tensors, world_size, rank):
    """ZeRO-3: every tensor is cut into equal parts, padded at the end."""
    fragments = []
    for key, shape in tensors.items():
        count = math.prod(shape)
        share = -(-count // world_size)
        held = Interval(min(count, rank * share), min(count, (rank + 1) * share))
        fragments.append(Fragment(key, "float32", shape, held))
    return fragments


def replicated(tensors, world_size, rank):
    """ZeRO-0: every rank has all of it and writes its share."""
    return [Holding(whole(key, shape), rank, world_size).share for key, shape in tensors.items()]


layouts = st.sampled_from([zero_partition, per_tensor, replicated])
ranks = st.integers(1, 64)


def stored_by(tensors, layout, world_size):
    packs = [pack(layout(tensors, world_size, rank), chunk_bytes=4096)
             for rank in range(world_size)]  # fmt: skip
    return gather([item.entries for item in packs]), packs


@settings(max_examples=150, deadline=None)
@given(shapes, layouts, layouts, ranks, ranks, st.data())
def test_every_wanted_byte_is_planned_exactly_once(
    shape_list, written, wanted, written_by, read_by, data
):
    tensors = model(shape_list)
    stored, packs = stored_by(tensors, written, written_by)
    assert set(stored) == set(tensors)
    rank = data.draw(st.integers(0, read_by - 1))
    requests = wanted(tensors, read_by, rank)
    plan = plan_reads(stored, requests)

    truth = {key: np.arange(math.prod(shape) * 4) for key, shape in tensors.items()}
    streams = []
    for item in packs:
        stream = np.full(item.raw_bytes, -1)
        for entry in item.entries:
            span = entry.fragment.interval
            values = truth[entry.fragment.key][span.start * 4 : span.stop * 4]
            stream[entry.raw_offset : entry.raw_stop] = values
        streams.append((stream, item.entries))
    targets = [np.full(request.size_bytes, -2) for request in requests]
    for transfer in plan.transfers:
        stream, entries = streams[transfer.shard]
        source = stream[transfer.raw_offset : transfer.raw_offset + transfer.size_bytes]
        target = targets[transfer.request]
        place = slice(transfer.target_offset, transfer.target_offset + transfer.size_bytes)
        assert len(source) == transfer.size_bytes and np.all(target[place] == -2)
        assert owner(entries, transfer.raw_offset) == requests[transfer.request].key
        target[place] = source
    for request, target in zip(requests, targets, strict=True):
        span = request.interval
        assert np.array_equal(target, truth[request.key][span.start * 4 : span.stop * 4])
    assert plan.size_bytes == sum(request.size_bytes for request in requests)
    assert list(plan.transfers) == sorted(
        plan.transfers, key=lambda item: (item.shard, item.raw_offset, item.request)
    )


def owner(entries, raw_offset):
    return next(item.fragment.key for item in entries
                if item.raw_offset <= raw_offset < item.raw_stop)  # fmt: skip


@pytest.mark.parametrize("written_by", [1, 2, 3, 7, 32, 64])
@pytest.mark.parametrize("read_by", [1, 2, 5, 8, 63, 64])
def test_all_ranks_together_read_everything_once(written_by, read_by):
    tensors = model([(17, 5), (3,), (), (64, 9)])
    stored, _ = stored_by(tensors, zero_partition, written_by)
    reads = {}
    for rank in range(read_by):
        for item in plan_reads(stored, zero_partition(tensors, read_by, rank)).transfers:
            key = (item.shard, item.raw_offset)
            assert key not in reads
            reads[key] = item.size_bytes
    assert sum(reads.values()) == sum(math.prod(shape) * 4 for shape in tensors.values())


@settings(max_examples=100, deadline=None)
@given(shapes, layouts, ranks, st.data())
def test_what_one_shard_held_is_missed_by_name(shape_list, layout, world_size, data):
    tensors = {key: shape for key, shape in model(shape_list).items() if math.prod(shape)}
    stored_entries = [list(pack(layout(tensors, world_size, rank), chunk_bytes=4096).entries)
                      for rank in range(world_size)]  # fmt: skip
    holders = [rank for rank, entries in enumerate(stored_entries) if entries]
    if not holders:
        return
    lost = stored_entries[data.draw(st.sampled_from(holders))]
    entry = lost.pop(data.draw(st.integers(0, len(lost) - 1)))
    stored = gather(stored_entries)
    key = entry.fragment.key
    assert key not in stored or uncovered(stored[key]) == entry.fragment.interval
    with pytest.raises(InvalidLayoutError) as caught:
        plan_reads(stored, [whole(key, tensors[key])])
    assert str(key) in str(caught.value)


def test_all_differences_are_counted_and_the_first_are_listed():
    stored = {TensorKey("fp32", f"q{n}"): StoredTensor("float32", (4,), ()) for n in range(3)}
    full = (Extent(Interval(0, 4), 0, 0),)
    stored[TensorKey("fp32", "shape")] = StoredTensor("float32", (2, 2), full)
    stored[TensorKey("fp32", "type")] = StoredTensor("bfloat16", (4,), full)
    wanted = [whole(TensorKey("fp32", f"absent{n}"), (4,)) for n in range(9)]
    wanted += [whole(key, (4,)) for key in stored]
    with pytest.raises(InvalidLayoutError) as caught:
        plan_reads(stored, wanted)
    text = str(caught.value)
    assert "9 not in the checkpoint: fp32:absent0 float32[4]" in text and "and 4 more" in text
    assert "1 stored with another shape: fp32:shape stored [2, 2], wanted [4]" in text
    assert "1 stored with another dtype: fp32:type stored bfloat16, wanted float32" in text
    assert "3 stored only in part: fp32:q0 lacks [0, 4)" in text
    assert "spotspeed show" in text


def test_shards_that_store_a_part_twice_or_disagree_are_refused():
    key = TensorKey("fp32", "p")
    first = Entry(Fragment(key, "float32", (8,), Interval(0, 5)), 0)
    second = Entry(Fragment(key, "float32", (8,), Interval(4, 8)), 0)
    with pytest.raises(InvalidLayoutError, match="p from element 4 in shards 0 and 1"):
        gather([[first], [second]])
    other = Entry(Fragment(key, "float32", (2, 4), Interval(5, 8)), 0)
    with pytest.raises(InvalidLayoutError, match=r"is float32\[8\] and, in shard 1"):
        gather([[first], [other]])


def test_overlapping_extents_are_refused_when_they_are_asked_for():
    key = TensorKey("fp32", "p")
    extents = (Extent(Interval(0, 5), 0, 0), Extent(Interval(4, 8), 1, 0))
    with pytest.raises(InvalidLayoutError, match="stored more than once: fp32:p from element 4"):
        plan_reads({key: StoredTensor("float32", (8,), extents)}, [whole(key, (8,))])
