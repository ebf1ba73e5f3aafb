"""One number a shard tells whether the shards together lack a part of a tensor."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from spotspeed.core.coverage import coverage, covers
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey

KEY = TensorKey("fp32", "layer.weight")


def part(start: int, stop: int, shape: tuple[int, ...] = (100,), key: TensorKey = KEY) -> Fragment:
    return Fragment(key, "float32", shape, Interval(start, stop))


def is_whole(*shards: list[Fragment]) -> bool:
    return covers([coverage(shard) for shard in shards])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 2**32),
       st.integers(1, 5))  # fmt: skip
def test_any_cut_of_any_tensors_over_any_ranks_is_whole(sizes, seed, ranks):
    chooser = random.Random(seed)
    shards: list[list[Fragment]] = [[] for _ in range(ranks)]
    for number, size in enumerate(sizes):
        key = TensorKey("fp32", f"layer.{number}")
        cuts = sorted({0, size, *(chooser.randint(0, size) for _ in range(3))})
        for start, stop in pairwise(cuts):
            shards[chooser.randrange(ranks)].append(part(start, stop, (size,), key))
    assert is_whole(*shards)
    held = [shard for shard in shards if shard]
    victim = chooser.choice(held)
    lost = victim.pop(chooser.randrange(len(victim)))
    # A tensor that nobody mentions, or that is there twice as a whole, is another check's.
    is_all_of_it = lost.interval.count == lost.shape[0]
    assert is_whole(*shards) == is_all_of_it
    victim += [lost, lost]
    assert is_whole(*shards) == is_all_of_it


def test_a_gap_an_overlap_and_both_at_once_are_seen():
    assert is_whole([part(0, 40)], [part(40, 100)])
    assert not is_whole([part(0, 40)], [part(41, 100)])
    assert not is_whole([part(0, 40)], [part(39, 100)])
    assert not is_whole([part(0, 40), part(60, 80)], [part(40, 60), part(60, 80)]), "as many"
    assert not is_whole([part(1, 100)]) and not is_whole([part(0, 99)])


def test_parts_that_disagree_about_their_tensor_are_no_whole():
    for other in (
        part(40, 100, (10, 10)),
        replace(part(40, 100), dtype="int32"),
        part(40, 100, key=TensorKey("fp32", "layer.weight", "rank-1")),
    ):
        assert not is_whole([part(0, 40)], [other])


def test_scalars_and_tensors_without_elements_count():
    scalar = Fragment(TensorKey("step", "w"), "float32", (), Interval(0, 1))
    empty = Fragment(TensorKey("weight", "e"), "float32", (0, 4), Interval(0, 0))
    assert is_whole([scalar, empty], []) and is_whole([scalar], [empty])
