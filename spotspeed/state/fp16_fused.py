"""FP16_Optimizer (stage 0 with FusedAdam): one flat fp32 master per param_group, replicated."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from spotspeed.core.interval import Interval
from spotspeed.state.flat import flat_slots
from spotspeed.state.parameters import (
    ParameterNames,
    replica_of_parameter,
    replicated_residents,
    shape_of,
)
from spotspeed.state.partition import Partition, Resident
from spotspeed.state.probe import check_geometry, require


class FusedLayout:
    """`fp32_groups_flat[g]` is the concatenation of `fp16_groups[g]`, without padding."""

    name = "stage0-fused"

    def __init__(self, engine: Any) -> None:
        self._engine, self._wrapper = engine, engine.optimizer
        self._names = ParameterNames(engine)
        require(self._wrapper, "optimizer", "fp16_groups", "fp32_groups_flat")
        for partition in self.partitions():
            check_geometry(partition, 0)

    @property
    def optimizer(self) -> Any:
        return self._wrapper.optimizer

    def partitions(self) -> list[Partition]:
        found = []
        groups = zip(
            self.optimizer.param_groups, self._wrapper.fp16_groups,
            self._wrapper.fp32_groups_flat, strict=True,
        )  # fmt: skip
        for hyper, parameters, master in groups:
            names = tuple(self._names.of(parameter) for parameter in parameters)
            shapes = [shape_of(parameter) for parameter in parameters]
            offsets = [0, *accumulate(parameter.numel() for parameter in parameters)][:-1]
            placed = zip(names, shapes, parameters, offsets, strict=True)
            slots = flat_slots(placed, Interval(0, master.numel()))
            # DeepSpeed keeps experts in groups of their own.
            replica = replica_of_parameter(self._engine, parameters[0])
            found.append(Partition(master, slots, names, hyper, *replica))
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
