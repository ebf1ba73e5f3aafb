"""The ordered loader gives the sampler's order; nothing else of the user's loader changes."""

from __future__ import annotations

import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
)

from spotspeed.core.sample_order import GlobalSampler
from spotspeed.errors import ConfigError
from spotspeed.state.loader import SeededDataset, as_loader, ordered_loader, reads_shuffled
from spotspeed.state.workers import WorkerInit


class Noisy(Dataset):
    """Each sample is its index and a draw from each of the global generators."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()],
                            dtype=torch.float64)  # fmt: skip


class Batched(Noisy):
    def __getitems__(self, indices):
        assert type(indices) is list
        return [self[index] for index in indices]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def sampler(**changes):
    numbers = {"global_batch": 4, "micro_batch": 2, "rank": 0, "world_size": 1, "seed": 7}
    return GlobalSampler(20, **{**numbers, **changes})


def take(loader, count):
    iterator = iter(loader)
    found = list(itertools.islice(iterator, count))
    del iterator
    return found


def test_the_loader_follows_the_sampler_and_collates_as_before():
    loader = DataLoader(Noisy(), 2, shuffle=True, collate_fn=lambda s: [int(x[0]) for x in s])
    assert take(ordered_loader(loader, sampler()), 6) == list(itertools.islice(sampler(), 6))


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_and_reading_leaves_the_generators_of_the_training_alone(workers):
    ordered = ordered_loader(DataLoader(range(20), 2, num_workers=workers), sampler())
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    take(ordered, 3)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1][1])
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("dataset", [Noisy(), Batched()], ids=["each", "batched"])
def test_random_samples_are_the_same_after_a_resume_with_other_workers(dataset):
    whole = take(ordered_loader(DataLoader(dataset, 2, num_workers=2), sampler()), 10)
    one = DataLoader(dataset, 2, num_workers=1, persistent_workers=True, prefetch_factor=3)
    rest = take(ordered_loader(one, sampler(start_sample=8)), 6)
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
    for draws in torch.cat(whole).T[1:]:
        assert len(set(draws.tolist())) == 20


def test_random_samples_do_not_depend_on_the_number_of_ranks():
    one = torch.cat(take(ordered_loader(DataLoader(Noisy(), 2, num_workers=1), sampler()), 2))
    two = []
    for rank in range(2):
        own = sampler(world_size=2, rank=rank)
        two += take(ordered_loader(DataLoader(Noisy(), 2, num_workers=1), own), 1)
    assert torch.equal(one, torch.cat(two))


def mark(worker_id):
    Marked.worker = worker_id


class Marked(Dataset):
    worker = None

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return -1 if Marked.worker is None else Marked.worker


def test_the_users_worker_init_fn_still_runs_in_each_worker():
    loader = DataLoader(Marked(), 2, num_workers=2, worker_init_fn=mark)
    ordered = ordered_loader(loader, sampler())
    assert isinstance(ordered.worker_init_fn, WorkerInit) and ordered.worker_init_fn.then is mark
    assert [batch.tolist() for batch in take(ordered, 4)] == [[0, 0], [1, 1], [0, 0], [1, 1]]
    assert Marked.worker is None


class Opened(Marked):
    opened = closed = -1

    def open(self):
        self.opened = 4

    def __getitem__(self, index):
        return self.opened, self.closed


def open_there(worker_id):
    dataset = torch.utils.data.get_worker_info().dataset
    dataset.open()
    dataset.closed = dataset.opened + 1


def test_a_worker_init_fn_finds_the_users_own_data_set():
    loader = DataLoader(Opened(), 2, num_workers=1, worker_init_fn=open_there)
    (batch,) = take(ordered_loader(loader, sampler()), 1)
    assert [column.tolist() for column in batch] == [[4, 4], [5, 5]]


def test_a_data_set_travels_to_a_spawned_worker_with_its_attributes():
    seeded = SeededDataset(Opened(), 3)
    seeded.open()
    again = pickle.loads(pickle.dumps(seeded))
    assert again.opened == 4 and again[0] == (4, -1) and len(again) == 20


def test_a_loader_of_another_kind_is_refused_by_name():
    with pytest.raises(ConfigError, match="loader is a list: expected a torch DataLoader"):
        as_loader([1, 2])


@pytest.mark.parametrize("setting", ["num_workers", "prefetch_factor", "persistent_workers",
                                     "timeout", "pin_memory", "collate_fn"])  # fmt: skip
def test_settings_of_the_users_loader_are_kept(setting):
    loader = DataLoader(range(20), 2, num_workers=1, prefetch_factor=5, persistent_workers=True,
                        timeout=30, collate_fn=list)  # fmt: skip
    assert getattr(ordered_loader(loader, sampler()), setting) == getattr(loader, setting)


@pytest.mark.parametrize(
    ("loader", "shuffles"),
    [
        (DataLoader(range(4)), False),
        (DataLoader(range(4), shuffle=True), True),
        (DataLoader(range(4), sampler=DistributedSampler(range(4), 2, 0)), True),
        (DataLoader(range(4), sampler=DistributedSampler(range(4), 2, 0, shuffle=False)), False),
        (DataLoader(range(20), batch_sampler=sampler()), True),
        (DataLoader(range(20), batch_sampler=sampler(shuffle=False)), False),
    ],
)
def test_known_samplers_tell_whether_they_shuffle(loader, shuffles):
    assert reads_shuffled(loader) is shuffles


@pytest.mark.parametrize(
    ("loader", "why"),
    [
        (DataLoader(Stream()), "iterable data set"),
        (DataLoader(range(4), sampler=SubsetRandomSampler([1, 2])), "SubsetRandomSampler"),
        (DataLoader(range(4), sampler=RandomSampler(range(4), replacement=True)), "RandomSampler"),
        (DataLoader(range(4), sampler=RandomSampler(range(4), num_samples=2)), "RandomSampler"),
        (DataLoader(range(4)), "made for 20 samples"),
        (DataLoader(range(20), batch_size=None), "NoneType"),
        (DataLoader(range(4), batch_sampler=sampler()), "made for 20 samples"),
    ],
)
def test_an_order_that_cannot_be_continued_is_refused(loader, why):
    with pytest.raises(ConfigError, match=why):
        ordered_loader(loader, sampler())
