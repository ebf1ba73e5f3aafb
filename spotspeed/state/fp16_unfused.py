"""FP16_UnfusedOptimizer (stage 0 in bf16 or fp16): one fp32 master per parameter, replicated."""

from __future__ import annotations

from typing import Any

from spotspeed.core.interval import Interval
from spotspeed.state.parameters import (
    ParameterNames,
    replica_of_parameter,
    replicated_residents,
    shape_of,
)
from spotspeed.state.partition import Partition, Resident, Slot
from spotspeed.state.probe import require


class UnfusedLayout:
    """Masters lie in `fp32_groups[g][j]` beside their parameters in `fp16_groups[g][j]`."""

    name = "stage0-unfused"

    def __init__(self, engine: Any) -> None:
        self._engine, self._wrapper = engine, engine.optimizer
        self._names = ParameterNames(engine)
        require(self._wrapper, "optimizer", "fp16_groups", "fp32_groups")
        self.partitions()

    @property
    def optimizer(self) -> Any:
        return self._wrapper.optimizer

    def partitions(self) -> list[Partition]:
        found = []
        groups = zip(
            self.optimizer.param_groups, self._wrapper.fp16_groups, self._wrapper.fp32_groups,
            strict=True,
        )  # fmt: skip
        for hyper, parameters, masters in groups:
            for parameter, master in zip(parameters, masters, strict=True):
                name, whole = self._names.of(parameter), Interval(0, parameter.numel())
                slot = Slot(name, shape_of(parameter), whole, 0, parameter.detach())
                replica = replica_of_parameter(self._engine, parameter)
                found.append(Partition(master, (slot,), (name,), hyper, *replica))
        return found

    def residents(self) -> list[Resident]:
        owned = (name for partition in self.partitions() for name in partition.names)
        return replicated_residents(self._engine, self._names, owned)

    def group_names(self) -> list[list[str]]:
        return [
            [self._names.of(parameter) for parameter in group]
            for group in self._wrapper.fp16_groups
        ]

    def share_weights(self) -> None:
        """Nothing to do: every rank derives the whole weight."""

    def relink(self) -> None:
        """Nothing to do: DeepSpeed keeps no views of this state."""
