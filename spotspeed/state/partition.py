"""The tensors that the optimizer updates on this rank, and whose elements they are.

Every DeepSpeed optimizer is described in these terms: a *partition* is one master tensor together
with the optimizer state that is keyed by it; its *slots* say which run of which parameter lies
where in it. Alignment padding belongs to no slot. A *resident* is a parameter that no optimizer
updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from spotspeed.core.interval import Interval


@dataclass(frozen=True, slots=True)
class Slot:
    """Elements `interval` of parameter `name`, from element `offset` of the master on.

    `weight` is the low-precision copy of exactly these elements, or None when the master is the
    weight itself or the copy is not in memory.
    """

    name: str
    shape: tuple[int, ...]
    interval: Interval
    offset: int
    weight: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class OwnState:
    """An optimizer state tensor of `count` elements that is not laid out like its master.

    `held` is what this rank stores of it and `needed` all that it has to be given: a rank may keep
    more than its part. `is_made` is false while the ranks are still making it, in the first step.
    """

    dtype: torch.dtype
    count: int
    held: tuple[Slot, ...]
    needed: tuple[Slot, ...]
    is_made: bool = True


class Swapped(Protocol):
    """A master and its optimizer state in files, from one optimizer step to the next."""

    @property
    def key(self) -> torch.Tensor:
        """The tensor that stands for the master meanwhile, and does not hold it."""
        ...

    def state(self) -> Mapping[str, torch.Tensor]:
        """Views of the files, by kind; writing to a view writes the file."""
        ...

    def make(self, kinds: Sequence[str]) -> None:
        """Make files of zeros for the kinds of state that the master lacks."""
        ...

    def drop(self) -> None:
        """Forget all optimizer state, as if the master had never been stepped."""
        ...


@dataclass(frozen=True, slots=True)
class Partition:
    """One master tensor, equal on all of `replica_count` replicas.

    `names` are the parameters whose elements the partitions of this kind hold on all ranks
    together, also when this rank holds none of them; `hyper` is the optimizer's param_group;
    `own` is the state, by kind, that has a layout of its own. `swapped` is set where master and
    state lie in files: `master` is a view of its file then.
    """

    master: torch.Tensor
    slots: tuple[Slot, ...]
    names: tuple[str, ...]
    hyper: Mapping[str, Any]
    replica_index: int = 0
    replica_count: int = 1
    own: Mapping[str, OwnState] = field(default_factory=dict)
    swapped: Swapped | None = None

    @property
    def key(self) -> torch.Tensor:
        """What the optimizer's `state` knows this master by."""
        return self.master if self.swapped is None else self.swapped.key

    def state_in(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's state of this master, wherever it lies; empty before it is made."""
        state = dict(optimizer.state.get(self.key) or {})
        return state if self.swapped is None else {**state, **self.swapped.state()}


@dataclass(frozen=True, slots=True)
class Resident:
    """A weight without an optimizer: elements `interval` of a frozen parameter, in `tensor`."""

    name: str
    shape: tuple[int, ...]
    interval: Interval
    tensor: torch.Tensor
    replica_index: int = 0
    replica_count: int = 1


class Layout(Protocol):
    """Where one class of DeepSpeed optimizer keeps its state; pointers are read at every call."""

    @property
    def name(self) -> str:
        """What the events and the checkpoint's description call this layout."""
        ...

    @property
    def optimizer(self) -> Any:
        """The optimizer whose `state` and `param_groups` are in force now."""
        ...

    def partitions(self) -> list[Partition]:
        """The partitions of this rank, in an order that is the same on all ranks."""
        ...

    def residents(self) -> list[Resident]:
        """The weights without an optimizer that this rank holds."""
        ...

    def group_names(self) -> list[list[str]]:
        """The parameters of each of `optimizer.param_groups`, by name."""
        ...

    def share_weights(self) -> None:
        """Spread this rank's freshly written weights to whoever caches or gathers them.

        Collective where weights are sharded: all ranks call it together.
        """
        ...

    def relink(self) -> None:
        """Point DeepSpeed's own views at the optimizer state as it is now."""
        ...
