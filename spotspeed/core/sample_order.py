"""The order of the samples of a job, as a pure function of a seed and a position.

All epochs form one endless stream: position p is sample `perm[p // n](p % n)` of a data set of n,
where every epoch has a permutation of its own. A global step takes the next `global_batch`
positions, whatever number of ranks shares them, so a resume on another number of ranks goes on
where the stream was, every sample of an epoch is used exactly once, and skipping costs nothing.

The permutation is a balanced Feistel network over the smallest even number of bits that holds n
(six at least: over four it is visibly not uniform), walked until it lands below n (Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 5); its round function is
SplitMix64's finaliser (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators",
2014). It is part of the format: a stored position means the same sample in every later version.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spotspeed.errors import ConfigError

Words = npt.NDArray[np.uint64]

_ROUNDS = 12
_MIN_HALF_BITS = 3
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = 2**64 - 1
_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """The stream of samples: which data set size, which seed, shuffled or in order."""

    dataset_size: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if not 0 < self.dataset_size < 2**48:
            raise ConfigError(f"a data set of {self.dataset_size} samples has no order")

    def samples(self, positions: Words) -> Words:
        """The sample at each position; both are arrays of uint64 of one shape."""
        size = np.uint64(self.dataset_size)
        epochs, offsets = np.divmod(positions, size)
        return _permute(offsets, epochs, self) if self.shuffle else offsets


@dataclass(frozen=True, slots=True)
class GlobalSampler:
    """Micro-batches of sample indices of one rank; a `batch_sampler` for torch's DataLoader.

    Micro-step j of global step k takes, on rank r of W, the m positions that begin at
    start_sample + k*G + (j*W + r)*m; a global batch has G and a micro-batch m samples. For any
    W the ranks together take the same G samples in step k. Every `iter()` begins at `start_sample`;
    getting there costs O(1).

    With `epochs` the stream ends after so many. What is left then and does not fill a global batch
    is a last, smaller step, divided as evenly as it goes among as many micro-batches (at most m
    samples each, one more in some than in others); with `drop_last` it is left out. So is what has
    fewer samples than a step has micro-batches, because some rank would have none: unless, with
    `shares_tail`, it and the step before become two steps of half the size each. `taken` then tells
    where a step ends.

    Raises ConfigError when G does not divide into micro-batches of all ranks.
    """

    dataset_size: int
    _: KW_ONLY
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    seed: int = 0
    shuffle: bool = True
    start_sample: int = 0
    epochs: int | None = None
    drop_last: bool = False
    shares_tail: bool = False

    def __post_init__(self) -> None:
        check_division(self.global_batch, self.micro_batch, self.world_size)
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} of {self.world_size}")
        if self.start_sample < 0 or (self.epochs is not None and self.epochs < 1):
            raise ConfigError(f"start_sample {self.start_sample} or epochs {self.epochs}: too low")
        SampleOrder(self.dataset_size, self.seed, self.shuffle)

    @property
    def order(self) -> SampleOrder:
        """The stream that all ranks share."""
        return SampleOrder(self.dataset_size, self.seed, self.shuffle)

    @property
    def micro_steps(self) -> int:
        """Micro-batches of this rank in one global step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    @property
    def left_out(self) -> int:
        """Samples at the stream's end that no step takes; 0 for an endless stream."""
        left, (full, last) = self._left(), self._steps()
        return 0 if left is None or full is None else left - full * self.global_batch - sum(last)

    def taken(self, samples: int) -> int:
        """How many samples steps have taken that count as `samples`, a global batch each.

        The two differ only at the end of the last epoch.
        """
        full, last = self._steps()
        if full is None or samples <= full * self.global_batch:
            return samples
        steps = samples // self.global_batch - full
        return full * self.global_batch + sum(last[:steps])

    def __iter__(self) -> Iterator[MicroBatch]:
        order, step, (steps, last) = self.order, 0, self._steps()
        steps_at_once = max(1, _BLOCK * self.world_size // self.global_batch)
        while steps is None or step < steps:
            count = steps_at_once if steps is None else min(steps_at_once, steps - step)
            positions = self._positions(step, count)
            samples = order.samples(positions)
            for own_positions, own_samples in zip(positions, samples, strict=True):
                yield MicroBatch(own_samples.tolist(), own_positions.tolist())
            step += count
        first = self.start_sample + step * self.global_batch
        for size in last:
            for own in self._uneven(first, size):
                yield MicroBatch(order.samples(own).tolist(), own.tolist())
            first += size

    def __len__(self) -> int:
        steps, last = self._steps()
        if steps is None:
            raise TypeError("an endless stream of samples has no length: give epochs")
        return (steps + len(last)) * self.micro_steps

    def _left(self) -> int | None:
        """Samples of the stream from `start_sample` on."""
        if self.epochs is None:
            return None
        return max(0, self.epochs * self.dataset_size - self.start_sample)

    def _steps(self) -> tuple[int | None, tuple[int, ...]]:
        """The number of whole global batches, and the sizes of the smaller ones that follow."""
        left = self._left()
        if left is None:
            return None, ()
        full, tail = divmod(left, self.global_batch)
        micro_batches = self.global_batch // self.micro_batch
        if not tail or self.drop_last:
            return full, ()
        if tail >= micro_batches:
            return full, (tail,)
        both = self.global_batch + tail
        if self.shares_tail and full and both // 2 >= micro_batches:
            return full - 1, (both - both // 2, both // 2)
        return full, ()

    def _uneven(self, first: int, size: int) -> Iterator[Words]:
        """The positions of this rank's micro-batches of the `size` samples from `first` on."""
        least, larger = divmod(size, self.micro_steps * self.world_size)
        for number in range(self.rank, self.micro_steps * self.world_size, self.world_size):
            begin = first + number * least + min(number, larger)
            yield np.arange(begin, begin + least + (number < larger), dtype=np.uint64)

    def _positions(self, step: int, count: int) -> Words:
        """The positions of steps [step, step + count): one row for each micro-batch."""
        first = self.start_sample + step * self.global_batch
        micro = np.arange(count * self.micro_steps, dtype=np.uint64)[:, None]
        stride = np.uint64(self.micro_batch * self.world_size)
        own = np.uint64(first + self.rank * self.micro_batch)
        found: Words = own + micro * stride + np.arange(self.micro_batch, dtype=np.uint64)[None, :]
        return found


class MicroBatch(list[int]):
    """The sample indices of one micro-batch, and where in the stream each of them stands."""

    def __init__(self, samples: list[int], positions: list[int]) -> None:
        super().__init__(samples)
        self.positions = positions

    def __reduce__(self) -> tuple[Any, ...]:
        return (MicroBatch, (list(self), self.positions))


def check_division(global_batch: int, micro_batch: int, world_size: int) -> None:
    """Raise ConfigError, naming the numbers of ranks that would do, when the batch does not divide.

    A global batch is micro_batch * world_size * (gradient accumulation steps).
    """
    if global_batch < 1 or micro_batch < 1 or world_size < 1:
        raise ConfigError(
            f"a global batch of {global_batch}, micro-batches of {micro_batch} and {world_size} "
            f"ranks: all must be positive"
        )
    if global_batch % (micro_batch * world_size):
        micro_batches = global_batch // micro_batch
        if global_batch % micro_batch:
            hint = f"micro-batches of {micro_batch} do not divide it at all"
        else:
            valid = [w for w in range(1, micro_batches + 1) if micro_batches % w == 0]
            shown = ", ".join(map(str, valid[:40]))
            hint = f"with this micro-batch it can run on {shown} ranks"
        raise ConfigError(
            f"a global batch of {global_batch} samples does not divide into micro-batches of "
            f"{micro_batch} on {world_size} ranks: {hint}"
        )


def _permute(offsets: Words, epochs: Words, order: SampleOrder) -> Words:
    """Where each epoch's permutation puts each offset below `order.dataset_size`."""
    if order.dataset_size == 1:
        return np.zeros_like(offsets)
    half = np.uint64(max(_MIN_HALF_BITS, ((order.dataset_size - 1).bit_length() + 1) // 2))
    size = np.uint64(order.dataset_size)
    keys = _mix(_mix(epochs + np.uint64(1)) ^ np.uint64(_seed_word(order.seed)))
    found = _feistel(offsets, keys, half)
    outside = found >= size
    while outside.any():
        found[outside] = _feistel(found[outside], keys[outside], half)
        outside = found >= size
    return found


def _feistel(values: Words, keys: Words, half: np.uint64) -> Words:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for number in range(_ROUNDS):
        key = keys + np.uint64((number + 1) * _GOLDEN & _MASK64)
        left, right = right, left ^ (_mix(right ^ key) & mask)
    found: Words = (left << half) | right
    return found


def _mix(words: Words) -> Words:
    """SplitMix64's finaliser, element by element, modulo 2**64."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = words ^ (words >> np.uint64(31))
    return mixed


def _seed_word(seed: int) -> int:
    return int(_mix(np.array([(seed + _GOLDEN) & _MASK64], dtype=np.uint64))[0])
