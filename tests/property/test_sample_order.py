"""Every sample of an epoch is used exactly once, whatever ranks take turns at the stream."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spotspeed.core.sample_order import GlobalSampler, SampleOrder

sizes = st.integers(1, 300) | st.integers(301, 5000)
seeds = st.integers(0, 2**64) | st.integers(-5, 5)


@settings(max_examples=150, deadline=None)
@given(sizes, seeds, st.integers(0, 2**30))
def test_every_epoch_is_a_permutation(size, seed, epoch):
    order = SampleOrder(size, seed, True)
    positions = np.arange(epoch * size, (epoch + 1) * size, dtype=np.uint64)
    assert sorted(order.samples(positions).tolist()) == list(range(size))


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def runs(draw):
    """A data set, a global batch, and a sequence of (ranks, micro-batch, steps) that share it."""
    global_batch = draw(st.sampled_from([1, 4, 6, 12, 16, 24]))
    legs = []
    for _ in range(draw(st.integers(1, 5))):
        micro_batches = draw(st.sampled_from(divisors(global_batch)))
        world_size = draw(st.sampled_from(divisors(micro_batches)))
        legs.append((world_size, global_batch // micro_batches, draw(st.integers(0, 6))))
    return draw(st.integers(1, 60)), global_batch, draw(seeds), draw(st.booleans()), legs


@settings(max_examples=200, deadline=None)
@given(runs())
def test_any_sequence_of_world_sizes_takes_the_same_samples_in_every_step(run):
    size, global_batch, seed, shuffle, legs = run
    order, sample, steps = SampleOrder(size, seed, shuffle), 0, []
    for world_size, micro_batch, count in legs:
        taken = []
        for rank in range(world_size):
            sampler = GlobalSampler(
                size, global_batch=global_batch, micro_batch=micro_batch, rank=rank,
                world_size=world_size, seed=seed, shuffle=shuffle, start_sample=sample,
            )  # fmt: skip
            own = list(itertools.islice(sampler, count * sampler.micro_steps))
            assert all(len(batch) == micro_batch for batch in own)
            assert all(order.samples(np.array(batch.positions, np.uint64)).tolist() == batch
                       for batch in own)  # fmt: skip
            taken.append([own[i :: sampler.micro_steps] for i in range(sampler.micro_steps)])
        for step in range(count):
            steps.append(sorted(
                position for rank in taken for micro in rank for position in micro[step].positions
            ))  # fmt: skip
        sample += count * global_batch
    expected = [list(range(k * global_batch, (k + 1) * global_batch)) for k in range(len(steps))]
    assert steps == expected
    samples = order.samples(np.arange(sample, dtype=np.uint64)).tolist()
    for epoch in range(sample // size):
        assert Counter(samples[epoch * size : (epoch + 1) * size]) == Counter(range(size))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 50), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(0, 100),
       st.booleans(), st.booleans())  # fmt: skip
def test_a_stream_with_an_end_yields_as_many_batches_as_it_says(
    size, epochs, world, start, drop_last, shares_tail
):
    sampler = GlobalSampler(size, global_batch=8, micro_batch=2, rank=world - 1, world_size=world,
                            epochs=epochs, start_sample=start, drop_last=drop_last,
                            shares_tail=shares_tail)  # fmt: skip
    batches = list(sampler)
    assert len(batches) == len(sampler)
    positions = [position for batch in batches for position in batch.positions]
    assert all(start <= position < epochs * size for position in positions)
    assert sampler.left_out < (8 if drop_last else 4)
    if drop_last:
        assert all(len(batch) == 2 for batch in batches)


@st.composite
def finite_runs(draw):
    """A data set, epochs, a global batch, and launches of (ranks, micro-batch, steps)."""
    global_batch = draw(st.sampled_from([1, 4, 6, 12, 16, 24]))
    legs = []
    for _ in range(draw(st.integers(1, 6))):
        micro_batches = draw(st.sampled_from(divisors(global_batch)))
        world_size = draw(st.sampled_from(divisors(micro_batches)))
        legs.append((world_size, global_batch // micro_batches, draw(st.integers(0, 5))))
    legs.append((*legs[-1][:2], 10**6))
    return draw(st.integers(1, 80)), draw(st.integers(1, 3)), global_batch, legs


@settings(max_examples=300, deadline=None)
@given(finite_runs())
def test_every_sample_of_all_epochs_comes_once_tails_included(run):
    """Whatever launches take turns; but for fewer samples than a step has micro-batches."""
    size, epochs, global_batch, legs = run
    order, at, seen, left_out, last_micro = SampleOrder(size, 3, True), 0, Counter(), 0, 0
    for world_size, micro_batch, count in legs:
        ranks = [
            GlobalSampler(size, global_batch=global_batch, micro_batch=micro_batch, rank=rank,
                          world_size=world_size, seed=3, start_sample=at, epochs=epochs,
                          shares_tail=True)
            for rank in range(world_size)
        ]  # fmt: skip
        each = ranks[0].micro_steps
        own = [list(itertools.islice(sampler, count * each)) for sampler in ranks]
        assert len({len(batches) for batches in own}) == 1, "ranks need the same collectives"
        steps = len(own[0]) // each
        assert len(own[0]) == steps * each
        taken = [position for batches in own for batch in batches for position in batch.positions]
        assert all(1 <= len(batch) <= micro_batch for batches in own for batch in batches)
        # What a checkpoint stores is the sampler's count, and nothing before it is missing.
        after = at + ranks[0].taken(steps * global_batch)
        assert sorted(taken) == list(range(at, after))
        seen.update(order.samples(np.array(taken, np.uint64)).tolist())
        at, left_out, last_micro = after, epochs * size - after, micro_batch
    assert left_out == 0 or left_out < global_batch // last_micro
    assert left_out == 0 or last_micro == 1 or size * epochs < global_batch or len(legs) > 2
    assert sum(seen.values()) == size * epochs - left_out
    assert set(seen.values()) <= ({epochs} if not left_out else {epochs - 1, epochs})
