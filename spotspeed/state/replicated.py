"""Stage 0 with an optimizer of its own: the parameters are the masters, whole on every rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from spotspeed.core.interval import Interval
from spotspeed.state.parameters import (
    ParameterNames,
    replica_of_parameter,
    replicated_residents,
    shape_of,
)
from spotspeed.state.partition import Partition, Resident, Slot


class ReplicatedLayout:
    """A parameter that never had a gradient has no optimizer state, and keeps having none."""

    name = "stage0"

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._names = ParameterNames(engine)
        self._expected: frozenset[str] = frozenset()
        self.partitions()

    def expect(self, masters: Iterable[str]) -> frozenset[str]:
        """Take parameters that a checkpoint has as trained for trained, frozen or not for now.

        Returns the parameters that either side may freeze: here a weight is its own master.
        """
        self._expected = frozenset(masters)
        return frozenset(name for group in self.group_names() for name in group)

    @property
    def optimizer(self) -> Any:
        return self._engine.optimizer

    def partitions(self) -> list[Partition]:
        found = []
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if self._is_trained(parameter) and parameter.numel():
                    name, shape = self._names.of(parameter), shape_of(parameter)
                    slot = Slot(name, shape, Interval(0, parameter.numel()), 0)
                    replica = replica_of_parameter(self._engine, parameter)
                    found.append(Partition(parameter, (slot,), (name,), group, *replica))
        return found

    def _is_trained(self, parameter: torch.Tensor) -> bool:
        """Whether it is updated, or was until it was frozen: then its state is kept as well."""
        if self._expected and self._names.of(parameter) in self._expected:
            return True
        state = self.optimizer.state.get(parameter) or {}
        return parameter.requires_grad or (bool(state) and float(state.get("step", 1)) > 0)

    def residents(self) -> list[Resident]:
        owned = (name for partition in self.partitions() for name in partition.names)
        return replicated_residents(self._engine, self._names, owned)

    def group_names(self) -> list[list[str]]:
        return [
            [self._names.of(parameter) for parameter in group["params"]]
            for group in self.optimizer.param_groups
        ]

    def share_weights(self) -> None:
        """Nothing to do: the masters are the weights."""

    def relink(self) -> None:
        """Nothing to do: DeepSpeed keeps no views of this state."""
