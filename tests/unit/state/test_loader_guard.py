"""A run that is cut at any step draws the numbers of the uninterrupted one, epochs' ends included.

The loops are those of plain scripts; a step draws one number, as dropout does.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from spotspeed.state import loader_guard

DATA = list(range(8))
STEPS = 4
"""Of one epoch."""
EPOCHS = 3


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(loader_guard, "_guard", loader_guard._Guard())
    loader_guard.watch()
    yield
    loader_guard.release()


class Run:
    """What a checkpointer does around the steps of a loop."""

    def __init__(self, kept=None):
        self.step, self.drawn, self.kept = 0, [], {}
        # Another process: what it sees of its loaders begins anew.
        loader_guard._guard = loader_guard._Guard()
        if kept is None:
            torch.manual_seed(0)
        else:
            self.step, state, is_between = kept
            torch.set_rng_state(state)
            loader_guard.hold(draws=is_between)

    def train(self):
        loader_guard.release()
        self.drawn.append(torch.rand(1).item())
        self.step += 1
        loader_guard.complete_step()
        self.keep()

    def keep(self):
        self.kept[self.step] = (self.step, torch.get_rng_state(), loader_guard.is_between_epochs())


def loader(**settings):
    return DataLoader(DATA, batch_size=2, **settings)


def new_each_epoch(run):
    for _ in range(run.step // STEPS, EPOCHS):
        skipped = run.step % STEPS
        for _ in itertools.islice(loader(), skipped, None):
            run.train()


def replayed_from_the_first_epoch(run):
    one, seen = loader(), 0
    for _ in range(EPOCHS):
        for _ in one:
            seen += 1
            if seen > run.step:
                run.train()


def endless(run):
    one = loader()
    batches = iter(one)
    for _ in range(run.step % STEPS):
        next(batches)
    while run.step < EPOCHS * STEPS:
        try:
            next(batches)
        except StopIteration:
            batches = iter(one)
            next(batches)
        run.train()


def two_loaders(run):
    for _ in range(run.step // STEPS, EPOCHS):
        skipped = run.step % STEPS
        for _ in itertools.islice(zip(loader(), loader(), strict=True), skipped, None):
            run.train()


def evaluated_each_step(run):
    for _ in range(run.step // STEPS, EPOCHS):
        skipped = run.step % STEPS
        for _ in itertools.islice(loader(), skipped, None):
            list(loader(generator=torch.Generator()))
            run.train()


def persistent_workers(run):
    one = loader(num_workers=1, persistent_workers=True)
    for _ in range(run.step // STEPS, EPOCHS):
        for _ in itertools.islice(one, run.step % STEPS, None):
            run.train()


class ReadsAhead:
    """As Accelerate's loader does: it knows a batch before whether it is the last."""

    def __init__(self, base):
        self.base, self.end_of_dataloader = base, False

    def __iter__(self):
        self.end_of_dataloader = False
        batches = self.base.__iter__()
        current = next(batches)
        while True:
            try:
                following = next(batches)
            except StopIteration:
                self.end_of_dataloader = True
                yield current
                return
            yield current
            current = following


def read_ahead(run):
    one = ReadsAhead(loader())
    for _ in range(run.step // STEPS, EPOCHS):
        for _ in itertools.islice(one, run.step % STEPS, None):
            run.train()


def shuffled_at_epochs(run):
    """A shuffle draws too; only where epochs begin can its order be drawn again."""
    for _ in range(run.step // STEPS, EPOCHS):
        for batch in loader(shuffle=True):
            run.train()
            run.drawn[-1] += batch.sum().item() * 100


@pytest.mark.parametrize(
    "loop",
    [new_each_epoch, replayed_from_the_first_epoch, endless, two_loaders, evaluated_each_step,
     read_ahead, persistent_workers],
)  # fmt: skip
def test_a_run_cut_at_any_step_draws_what_the_whole_one_draws(loop):
    whole = Run()
    loop(whole)
    assert len(whole.drawn) == EPOCHS * STEPS
    cuts = (3, 4, 5) if loop is persistent_workers else range(1, EPOCHS * STEPS)
    for cut in cuts:
        resumed = Run(whole.kept[cut])
        loop(resumed)
        assert resumed.drawn == whole.drawn[cut:], f"cut after step {cut}"


def test_at_an_epochs_end_a_shuffled_order_goes_on_as_well():
    whole = Run()
    shuffled_at_epochs(whole)
    resumed = Run(whole.kept[STEPS])
    shuffled_at_epochs(resumed)
    assert resumed.drawn == whole.drawn[STEPS:]


def test_a_state_kept_before_the_first_step_or_between_two_epochs_is_exact():
    def loop(run):
        if not run.step:
            run.keep()
        for _ in range(run.step // STEPS, EPOCHS):
            for _ in loader():
                run.train()
            # As spotspeed.save does after an epoch, when its iterator is gone.
            run.keep()

    whole = Run()
    loop(whole)
    for cut in (0, STEPS):
        resumed = Run(whole.kept[cut])
        loop(resumed)
        assert resumed.drawn == whole.drawn[cut:]
