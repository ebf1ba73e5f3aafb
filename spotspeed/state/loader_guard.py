"""Let DataLoaders that start after a resume draw from torch's generator as the whole run did.

Making a DataLoader's iterator draws a seed from torch's default generator. A boundary in the middle
of an epoch lies after that draw: the resumed run makes the iterator once more, and drawing again
would shift every dropout mask that follows. At the boundary that ends an epoch the next iterator's
draw is still to come. So iterators are watched, and each boundary records which of the two it is.
"""

from __future__ import annotations

import functools
import sys
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader

_READS_AHEAD = "end_of_dataloader"
"""Accelerate's loaders are a batch ahead of the loop, and say so when they have given the last."""


class _Watched:
    """One iterator that draws from the default generator, for as long as it lives."""

    def __init__(self, iterator: Any, loader: DataLoader[Any], owner: Any) -> None:
        self._iterator = weakref.ref(iterator)
        self._owner = weakref.ref(owner) if hasattr(owner, _READS_AHEAD) else None
        self.is_persistent = bool(loader.persistent_workers)
        self.has_fed_steps = False
        """Whether a step was completed while it lived: an evaluation's has not."""

    @property
    def is_alive(self) -> bool:
        return self._iterator() is not None

    def has_ended(self) -> bool:
        """Whether it has given its last batch; False where its length is not known."""
        iterator, owner = self._iterator(), self._owner and self._owner()
        if owner is not None:
            return bool(getattr(owner, _READS_AHEAD))
        try:
            return iterator is None or iterator._num_yielded >= len(iterator)
        except (TypeError, AttributeError):
            return False


@dataclass(frozen=True, slots=True)
class _Start:
    """The first time that a data set was iterated after the resume, and what came of it since."""

    dataset: Any
    before: torch.Tensor
    """The generator."""
    iterators: list[_Watched] = field(default_factory=list)


@dataclass(slots=True)
class _Guard:
    """What this process has seen of its DataLoaders since it was attached, or resumed."""

    is_holding: bool = False
    draws: bool = True
    """While nothing has started: whether the next iterator's draw is still to come."""
    has_started: bool = False
    """Whether an iterator was made, or a step completed, since."""
    watched: list[_Watched] = field(default_factory=list)
    _first: dict[int, _Start] = field(default_factory=dict)
    """By data set: the first start since the resume."""

    def start(self, loader: DataLoader[Any], original: Any, owner: Any) -> Any:
        before = torch.get_rng_state()
        if self.is_holding and self.draws and loader.generator is None:
            first = self._first.setdefault(id(loader.dataset), _Start(loader.dataset, before))
            if all(replayed.has_ended() for replayed in first.iterators):
                # An epoch that the script only replays is none of the whole run's here: what it
                # drew is taken back when the next one begins.
                torch.set_rng_state(first.before)
        iterator = original(loader)
        if self.is_holding and not self.draws:
            torch.set_rng_state(before)
        if loader.generator is None:
            self.has_started = True
            self.watched.append(_Watched(iterator, loader, owner))
            if id(loader.dataset) in self._first:
                self._first[id(loader.dataset)].iterators.append(self.watched[-1])
        return iterator

    def release(self) -> None:
        self.is_holding = False
        self._first.clear()

    def is_between_epochs(self) -> bool:
        if not self.has_started:
            return self.draws
        counted = [one for one in self.watched if one.has_fed_steps or one.is_alive]
        if not all(watched.has_ended() for watched in counted):
            return False
        # A persistent iterator draws once in its life.
        return any(not watched.is_persistent for watched in counted)

    def complete_step(self) -> None:
        # Of whichever engine: one that was only loaded may never have a step of its own.
        self.release()
        self.has_started = True
        living = [watched for watched in self.watched if watched.is_alive]
        for watched in living:
            watched.has_fed_steps = True
        self.watched = living or [watched for watched in self.watched if watched.has_fed_steps][-1:]


_guard = _Guard()


def watch() -> None:
    """Watch the DataLoaders that start from here on."""
    original = DataLoader._get_iterator
    if getattr(original, "_is_spotspeed", False):
        return

    @functools.wraps(original)
    def get_iterator(loader: DataLoader[Any]) -> Any:
        # Called by DataLoader.__iter__, for whoever reads ahead or for the loop itself.
        return _guard.start(loader, original, sys._getframe(2).f_locals.get("self"))

    get_iterator._is_spotspeed = True  # type: ignore[attr-defined]
    DataLoader._get_iterator = get_iterator  # type: ignore[method-assign,assignment]


def complete_step() -> None:
    """An update is complete: what is alive now has fed it."""
    _guard.complete_step()


def is_between_epochs() -> bool:
    """Whether the next iterator draws a seed that the generator, as it is now, has not given."""
    return _guard.is_between_epochs()


def hold(*, draws: bool) -> None:
    """The state was restored: until `release` iterators start as in the uninterrupted run.

    `draws` is what `is_between_epochs` was at that boundary.
    """
    global _guard
    watch()
    _guard = _Guard(is_holding=True, draws=draws, watched=_guard.watched)


def release() -> None:
    """The first step after the resume begins: DataLoaders draw their seeds as ever."""
    _guard.release()
