"""BF16_Optimizer (ZeRO-1 with fp32 accumulation): one flat master partition per param_group."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from deepspeed.runtime.utils import all_gather_dp_groups

from spotspeed.core.interval import Interval
from spotspeed.state.flat import GroupLayout, flat_slots, names_by_group, relink_fragments
from spotspeed.state.parameters import (
    ParameterNames,
    replica_of,
    replicated_residents,
    shape_of,
)
from spotspeed.state.partition import Partition, Resident
from spotspeed.state.probe import check_geometry, require
from spotspeed.state.spreading import spread


class Bf16Layout:
    """Partition `r` of a group is elements [r * size, (r + 1) * size) of its concatenation."""

    name = "bf16"

    def __init__(self, engine: Any) -> None:
        self._engine, self._wrapper = engine, engine.optimizer
        self._names = ParameterNames(engine)
        require(
            self._wrapper, "optimizer", "fp32_groups_flat_partition", "real_dp_process_group",
            "bf16_groups", "bf16_groups_flat", "bf16_partitioned_groups",
            "_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state",
            "nccl_start_alignment_factor", "allgather_bucket_size",
        )  # fmt: skip
        for index, partition in enumerate(self.partitions()):
            size = partition.master.numel()
            total = sum(parameter.numel() for parameter in self._wrapper.bf16_groups[index])
            rank, _ = replica_of(self._wrapper.real_dp_process_group[index])
            check_geometry(partition, size - max(0, min(size, total - rank * size)))

    @property
    def optimizer(self) -> Any:
        return self._wrapper.optimizer

    def partitions(self) -> list[Partition]:
        hyper = GroupLayout(self.optimizer)
        found = []
        for index, master in enumerate(self._wrapper.fp32_groups_flat_partition):
            rank, _ = replica_of(self._wrapper.real_dp_process_group[index])
            owned = Interval(rank * master.numel(), (rank + 1) * master.numel())
            group = self._wrapper.bf16_groups[index]
            names = tuple(self._names.of(parameter) for parameter in group)
            offsets = [0, *accumulate(parameter.numel() for parameter in group)][:-1]
            shapes = [shape_of(parameter) for parameter in group]
            placed = zip(names, shapes, group, offsets, strict=True)
            found.append(Partition(master, flat_slots(placed, owned), names, hyper.of(master)))
        return found

    def residents(self) -> list[Resident]:
        groups = self._wrapper.bf16_groups
        owned = (self._names.of(parameter) for group in groups for parameter in group)
        return replicated_residents(self._engine, self._names, owned)

    def group_names(self) -> list[list[str]]:
        masters = self._wrapper.fp32_groups_flat_partition
        groups = zip(masters, self._wrapper.bf16_groups, strict=True)
        return names_by_group(self.optimizer, self._names, groups)

    def share_weights(self) -> None:
        parts, groups = self._wrapper.bf16_partitioned_groups, self._wrapper.real_dp_process_group
        if spread(parts, groups):
            return
        all_gather_dp_groups(
            groups_flat=self._wrapper.bf16_groups_flat,
            partitioned_param_groups=parts,
            dp_process_group=groups,
            start_alignment_factor=self._wrapper.nccl_start_alignment_factor,
            allgather_bucket_size=self._wrapper.allgather_bucket_size,
        )

    def relink(self) -> None:
        relink_fragments(self._wrapper, self._wrapper.bf16_groups)
