"""The order is fixed for ever, looks random, costs nothing to skip, and refuses what cannot be."""

from __future__ import annotations

import itertools
import pickle
import time

import numpy as np
import pytest

from spotspeed.core.sample_order import GlobalSampler, MicroBatch, SampleOrder, check_division
from spotspeed.errors import ConfigError

FROZEN_SMALL = [
    9, 2, 3, 5, 7, 0, 1, 4, 6, 8,
    3, 5, 9, 0, 7, 2, 4, 6, 1, 8,
    9, 7, 8, 4, 0, 5, 2, 3, 1, 6,
]  # fmt: skip
FROZEN_LARGE = [800862, 627195, 472838, 477778, 477530]


def take(count, **changes):
    numbers = {"global_batch": 8, "micro_batch": 2, "rank": 0, "world_size": 1, **changes}
    return list(itertools.islice(GlobalSampler(20, **numbers), count))


def test_the_order_never_changes():
    """Stored positions mean these samples; a change here breaks every checkpoint's data order."""
    order = SampleOrder(10, 42, True)
    assert order.samples(np.arange(30, dtype=np.uint64)).tolist() == FROZEN_SMALL
    large = SampleOrder(1_000_003, 7, True)
    positions = np.array([0, 1, 1_000_002, 1_000_003, 123_456_789_012], dtype=np.uint64)
    assert large.samples(positions).tolist() == FROZEN_LARGE


def test_without_shuffling_the_stream_is_in_order():
    assert take(3, shuffle=False, start_sample=17) == [[17, 18], [19, 0], [1, 2]]


def test_every_position_of_an_epoch_gets_every_sample_equally_often():
    size, epochs = 5, 24_000
    samples = SampleOrder(size, 3, True).samples(np.arange(size * epochs, dtype=np.uint64))
    table = samples.reshape(epochs, size).astype(int)
    for column in table.T:
        assert np.abs(np.bincount(column, minlength=size) - epochs / size).max() < 300
    weights = size ** np.arange(size)
    counts = np.unique(table @ weights, return_counts=True)[1]
    assert len(counts) == 120
    chi_square = float(((counts - epochs / 120) ** 2 / (epochs / 120)).sum())
    assert chi_square < 190  # 119 degrees of freedom: 190 is exceeded once in 30,000


def test_seeds_and_epochs_have_orders_of_their_own():
    def epoch(seed, number):
        positions = np.arange(number * 100, (number + 1) * 100, dtype=np.uint64)
        return tuple(SampleOrder(100, seed, True).samples(positions).tolist())

    assert len({epoch(seed, number) for seed in range(-3, 20) for number in range(10)}) == 230


def test_skipping_far_ahead_costs_nothing():
    began = time.perf_counter()
    (batch,) = take(1, start_sample=8 * 10**15)
    assert time.perf_counter() - began < 0.5
    assert batch.positions == [8 * 10**15, 8 * 10**15 + 1]


def test_a_resumed_sampler_continues_the_first_one():
    whole = take(24)
    assert take(12, start_sample=24) == whole[12:]


def test_two_iterators_do_not_disturb_each_other():
    sampler = GlobalSampler(20, global_batch=8, micro_batch=2, rank=0, world_size=2)
    first, second = iter(sampler), iter(sampler)
    assert [next(first) for _ in range(5)] == [next(second) for _ in range(5)]


def test_a_micro_batch_travels_to_workers_with_its_positions():
    batch = pickle.loads(pickle.dumps(MicroBatch([3, 1], [10, 11])))
    assert batch == [3, 1] and batch.positions == [10, 11] and type(batch) is MicroBatch


def test_an_indivisible_batch_names_the_numbers_of_ranks_that_would_do():
    with pytest.raises(ConfigError, match=r"it can run on 1, 2, 3, 6 ranks"):
        GlobalSampler(20, global_batch=24, micro_batch=4, rank=0, world_size=4)
    with pytest.raises(ConfigError, match="do not divide it at all"):
        check_division(10, 4, 1)
    with pytest.raises(ConfigError, match="must be positive"):
        check_division(0, 4, 1)


@pytest.mark.parametrize("changes", [{"rank": 1}, {"rank": -1}, {"start_sample": -1},
                                     {"epochs": 0}, {"world_size": 0}])  # fmt: skip
def test_impossible_numbers_are_refused(changes):
    with pytest.raises(ConfigError):
        take(1, **changes)


def test_an_empty_data_set_and_an_endless_length_are_refused():
    with pytest.raises(ConfigError, match="0 samples"):
        GlobalSampler(0, global_batch=1, micro_batch=1, rank=0, world_size=1)
    with pytest.raises(TypeError, match="give epochs"):
        len(GlobalSampler(5, global_batch=1, micro_batch=1, rank=0, world_size=1))
