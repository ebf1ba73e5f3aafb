"""Targets that are neighbours in memory are read as one, and hold what they would hold alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.regions import join
from spotspeed.codec import CodecPolicy
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.reshard import Transfer


def cut(memory: bytearray, *bounds: int) -> list[memoryview]:
    return [memoryview(memory)[start:stop] for start, stop in pairwise(bounds)]


def test_neighbours_are_one_region_whatever_their_order():
    memory = bytearray(range(100))
    first, second, third = cut(memory, 0, 30, 31, 100)
    regions = join([third, first, second])
    assert [bytes(view) for view in regions.views] == [bytes(memory)]
    assert regions.places == [(0, 31), (0, 0), (0, 30)]


def test_a_gap_ends_a_region():
    memory = bytearray(100)
    first, _, last = cut(memory, 0, 30, 31, 100)
    regions = join([first, last])
    assert [len(view) for view in regions.views] == [30, 69]
    assert regions.places == [(0, 0), (1, 0)]


def test_what_is_written_to_a_region_is_in_its_targets():
    memory = bytearray(10)
    targets = cut(memory, 0, 0, 4, 4, 10)
    regions = join(targets)
    for region, offset in regions.places:
        assert 0 <= offset <= len(regions.views[region])
    whole = max(regions.views, key=len)
    whole[:] = bytes(range(10))
    assert [bytes(target) for target in targets] == [
        b"", bytes(range(4)), b"", bytes(range(4, 10)),
    ]  # fmt: skip


def test_only_transfers_that_go_on_in_shard_and_region_become_one():
    memory = bytearray(30)
    first, second, third = cut(memory, 0, 10, 20, 30)
    regions = join([first, second, third])
    moved = regions.move([
        Transfer(0, 100, 0, 0, 10), Transfer(0, 110, 1, 0, 10),  # the same in both: one
        Transfer(0, 121, 2, 0, 5), Transfer(1, 126, 2, 5, 5),  # after a gap; of another shard
    ])  # fmt: skip
    assert moved == [
        Transfer(0, 100, 0, 0, 20), Transfer(0, 121, 0, 20, 5), Transfer(1, 126, 0, 25, 5),
    ]  # fmt: skip


def test_many_small_neighbours_are_read_straight_into_place(checkpoint_factory):
    random = np.random.default_rng(2)
    tensors = {
        TensorKey("fp32", f"{number:02}"): ("float32", random.standard_normal(200_002, np.float32))
        for number in range(16)
    }
    written = checkpoint_factory(1, tensors=tensors, policy=CodecPolicy("raw"), chunk_bytes=1 << 20)
    reader = CheckpointReader(written.storage, written.manifest)
    out = np.empty(16 * 200_002, np.float32)
    fragments = [
        Fragment(key, "float32", array.shape, Interval(0, array.size))
        for key, (_, array) in sorted(tensors.items(), key=lambda item: item[0].name)
    ]
    targets = [memoryview(part).cast("B") for part in np.split(out, 16)]
    reader.read_into(list(zip(fragments, targets, strict=True)))
    expected = np.concatenate([tensors[fragment.key][1] for fragment in fragments])
    assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))
    _, spans = reader.plan(fragments, join(targets))
    assert sum(span.size_bytes for span in spans if span.is_direct) > 0.9 * out.nbytes
