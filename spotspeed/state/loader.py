"""An equivalent of a user's DataLoader whose order can be resumed anywhere, on any number of ranks.

The user's data set, collate_fn, workers and pinning stay; only the order is ours (a GlobalSampler),
and the loader draws from a generator of its own, so that starting an iterator, which happens once
more in a resumed run, leaves the training's random numbers alone.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from deepspeed import comm
from deepspeed.runtime.dataloader import DeepSpeedDataLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from spotspeed.core.sample_order import GlobalSampler, MicroBatch, SampleOrder
from spotspeed.errors import ConfigError
from spotspeed.state.cursor import Cursor, resume_sample
from spotspeed.state.engine import Engine
from spotspeed.state.small import SmallState
from spotspeed.state.workers import DEFAULT_SIGNALS, WorkerInit, held_back

_logger = logging.getLogger("spotspeed")


def reads_shuffled(loader: DataLoader[Any]) -> bool:
    """Whether the user's loader shuffles; raises ConfigError when its order is not known to us."""
    sampler = loader.sampler
    if isinstance(loader.batch_sampler, GlobalSampler):
        return loader.batch_sampler.shuffle
    if type(loader.batch_sampler) is not BatchSampler:
        raise ConfigError(
            f"the loader makes its batches with {type(loader.batch_sampler).__name__}, whose order "
            f"is not known: give it batch_size, and shuffle or a plain sampler"
        )
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise ConfigError(
            f"{type(loader.dataset).__name__} is an iterable data set: its position cannot be "
            f"restored exactly; use a map-style data set (with __getitem__ and __len__)"
        )
    if type(sampler) is DistributedSampler:
        return bool(sampler.shuffle)
    if type(sampler) is SequentialSampler:
        return False
    size = len(cast(Sized, loader.dataset))
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == size:
        return True
    raise ConfigError(
        f"the loader's sampler is a {type(sampler).__name__}, whose order cannot be continued on "
        f"another number of ranks; use shuffle=True or False, or a spotspeed.GlobalSampler as "
        f"batch_sampler"
    )


def as_loader(loader: Any) -> DataLoader[Any]:
    """`loader` as torch's class, also where `deepspeed.initialize(training_data=...)` made it.

    Raises ConfigError when it is of a class whose order is not known to us.
    """
    if isinstance(loader, DataLoader):
        return loader
    if not isinstance(loader, DeepSpeedDataLoader):
        raise ConfigError(
            f"loader is a {type(loader).__name__}: expected a torch DataLoader, or what "
            f"deepspeed.initialize(training_data=...) returns"
        )
    return DataLoader(
        loader.dataset, batch_size=loader.batch_size, sampler=loader.data_sampler,
        collate_fn=loader.collate_fn, num_workers=loader.num_local_io_workers,
        pin_memory=loader.pin_memory, drop_last=loader.dataloader_drop_last,
    )  # fmt: skip


def _drops_last(engine: Any, loader: DataLoader[Any]) -> bool:
    """Whether the last epoch ends with a whole global batch: pipelines exchange fixed shapes."""
    own = loader.batch_sampler if isinstance(loader.batch_sampler, GlobalSampler) else loader
    return bool(own.drop_last) or hasattr(type(engine), "train_batch")


def engine_sampler(
    engine: Any,
    loader: DataLoader[Any],
    *,
    stored: Mapping[str, Any] | None = None,
    seed: int | None = None,
    epochs: int | None = None,
) -> GlobalSampler:
    """The sampler of this rank for `loader`'s data, from where the stored cursor stands.

    Batch sizes are the engine's, ranks those of its data-parallel group. A new stream is shuffled
    as the loader is, by `seed` or else the loader's DistributedSampler's or 0, which must be the
    same on all ranks, and begins at the engine's count of samples. Raises ConfigError when the
    stored cursor is of another stream, or the global batch does not divide.
    """
    shuffle = reads_shuffled(loader)
    if seed is None:
        own = getattr(loader.batch_sampler, "seed", getattr(loader.sampler, "seed", 0))
        seed = int(own if stored is None else stored.get("seed", 0))
    size = len(cast(Sized, loader.dataset))
    if stored is None:
        start_sample = int(engine.global_samples)
    else:
        start_sample = resume_sample(stored, SampleOrder(size, seed, shuffle))
    return GlobalSampler(
        size,
        global_batch=int(engine.train_batch_size()),
        micro_batch=int(engine.train_micro_batch_size_per_gpu()),
        rank=int(comm.get_rank(group=engine.data_parallel_group)),
        world_size=int(engine.dp_world_size),
        seed=seed,
        shuffle=shuffle,
        start_sample=start_sample,
        epochs=epochs,
        drop_last=_drops_last(engine, loader),
        shares_tail=True,
    )


def engine_batches(
    engine: Engine, loader: Any, small: SmallState, *, epochs: int | None, signals: Sequence[str]
) -> Iterator[Any]:
    """Micro-batches of `loader` from where `engine` stands; `small` keeps the place from now on.

    They end `epochs` epochs after the end of the last call that gave all it had. Workers survive
    `signals`, by name. Raises ConfigError when the order cannot be continued, and in the middle
    when another state has been loaded since.
    """
    samples, loader = int(engine.global_samples), as_loader(loader)
    stored = small.cursor.at(samples) if small.cursor else None
    until = None if epochs is None else small.epochs_done + epochs
    sampler = engine_sampler(engine, loader, stored=stored, epochs=until)
    small.cursor = Cursor(sampler.order, start_sample=sampler.start_sample, global_samples=samples,
                          taken=sampler.taken)  # fmt: skip
    if sampler.left_out and sampler.rank == 0 and not sampler.drop_last:
        _logger.warning(
            "the last %d samples before the end of epoch %s make no step, which has %d micro "
            "batches: they come first in the next call of batches(), if there is one",
            sampler.left_out, until, sampler.global_batch // sampler.micro_batch,
        )  # fmt: skip
    count, end, jumps = 0, None if until is None else len(sampler), small.jumps
    try:
        for batch in ordered_loader(loader, sampler, signals=(*DEFAULT_SIGNALS, *signals)):
            count += 1
            yield batch
            if small.jumps != jumps:
                raise ConfigError(
                    "another state was loaded while batches() was being iterated, which is still "
                    "where the old one was: leave the loop after a load, and call batches() again"
                )
    finally:
        if count == end and until is not None:
            small.epochs_done = until


def ordered_loader(
    loader: DataLoader[Any],
    sampler: GlobalSampler,
    *,
    signals: tuple[str, ...] = DEFAULT_SIGNALS,
    seeds_samples: bool = True,
) -> DataLoader[Any]:
    """A DataLoader as `loader` is, in the order of `sampler`, with workers that survive a notice.

    With `seeds_samples` a worker's generators are seeded before each sample from the sampler's seed
    and the sample's position in the stream, so that random augmentation too is the same whatever
    number of workers or ranks there is and wherever the run resumed (once for a whole micro-batch
    where the data set has `__getitems__`). Without workers samples draw from the training's own
    generators, which are restored anyway.
    """
    reads_shuffled(loader)
    if sampler.order.dataset_size != len(cast(Sized, loader.dataset)):
        raise ConfigError(
            f"the sampler is made for {sampler.order.dataset_size} samples, the loader's data set "
            f"has {len(cast(Sized, loader.dataset))}"
        )
    workers: dict[str, Any] = {}
    dataset = loader.dataset
    if loader.num_workers > 0:
        workers = {
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
            "multiprocessing_context": loader.multiprocessing_context,
            "worker_init_fn": WorkerInit(signals, cast(Any, loader.worker_init_fn)),
            "timeout": loader.timeout,
        }
        if seeds_samples:
            dataset = SeededDataset(dataset, sampler.order.seed)
    if hasattr(loader, "in_order"):
        workers["in_order"] = True
    generator = torch.Generator()
    generator.manual_seed(_word(sampler.order.seed, "loader"))
    return _OrderedLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        pin_memory_device=loader.pin_memory_device,
        generator=generator,
        **workers,
    )


class _OrderedLoader(DataLoader[Any]):
    """A DataLoader whose workers start with the notice signals blocked."""

    def _get_iterator(self) -> Any:
        init = self.worker_init_fn
        if not isinstance(init, WorkerInit):
            return super()._get_iterator()
        with held_back(init.signals):
            return super()._get_iterator()


class SeededDataset(Dataset[Any]):
    """A map-style data set that seeds Python's, numpy's and torch's generators for each sample.

    Its attributes are those of the data set: a `worker_init_fn` opens files there.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        vars(self).update(_seeded=dataset, _seeded_by=seed)

    def __getattr__(self, name: str) -> Any:
        # Only what is not found on this object; while it is unpickled it has nothing yet.
        if name.startswith("_seeded"):
            raise AttributeError(name)
        return getattr(self._seeded, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._seeded, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return SeededDataset, (self._seeded, self._seeded_by)

    def __len__(self) -> int:
        return len(self._seeded)

    def __getitem__(self, index: int) -> Any:
        return self._seeded[index]

    def __getitems__(self, batch: MicroBatch) -> list[Any]:
        """The samples of one micro-batch; torch calls this in the worker."""
        own = getattr(self._seeded, "__getitems__", None)
        if own is not None:
            self._seed_for(batch.positions[0])
            return list(own(list(batch)))
        return list(self._each(batch))

    def _each(self, batch: MicroBatch) -> Iterator[Any]:
        for index, position in zip(batch, batch.positions, strict=True):
            self._seed_for(position)
            yield self._seeded[index]

    def _seed_for(self, position: int) -> None:
        word = _word(self._seeded_by, f"sample {position}")
        random.seed(word)
        np.random.seed(word & 0xFFFFFFFF)
        torch.default_generator.manual_seed(word)


def _word(seed: int, purpose: str) -> int:
    digest = hashlib.sha256(f"spotspeed data {seed} {purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
