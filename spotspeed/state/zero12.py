"""ZeRO stages 1 and 2: one flat master partition per param_group (DeepSpeedZeroOptimizer)."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from deepspeed.runtime.utils import all_gather_dp_groups

from spotspeed.core.interval import Interval
from spotspeed.state.flat import GroupLayout, flat_slots, names_by_group, relink_fragments
from spotspeed.state.parameters import (
    ParameterNames,
    replica_of,
    replicated_residents,
    shape_of,
)
from spotspeed.state.partition import OwnState, Partition, Resident, Slot
from spotspeed.state.probe import check_geometry, require
from spotspeed.state.spreading import spread


class Zero12Layout:
    """Partition `r` of a group is elements [r * size, (r + 1) * size) of its concatenation.

    The concatenation is the one of `round_robin_bit16_groups`: with `round_robin_gradients` the
    parameters are dealt out to the ranks, and `_hp_mapping` does not follow.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._zero = engine, engine.optimizer
        self._names = ParameterNames(engine)
        require(
            self._zero, "optimizer", "single_partition_of_fp32_groups", "real_dp_process_group",
            "round_robin_bit16_groups", "bit16_groups", "bit16_groups_flat", "groups_padding",
            "parallel_partitioned_bit16_groups", "_hp_optimizer_states_linked",
            "_lazy_init_hp_params_optimizer_state", "nccl_start_alignment_factor",
            "allgather_bucket_size",
        )  # fmt: skip
        for index, partition in enumerate(self.partitions()):
            check_geometry(partition, self._padding(index))

    @property
    def name(self) -> str:
        return "zero2" if getattr(self._zero, "partition_gradients", False) else "zero1"

    @property
    def optimizer(self) -> Any:
        return self._zero.optimizer

    def partitions(self) -> list[Partition]:
        hyper = GroupLayout(self.optimizer)
        found = []
        for index, master in enumerate(self._zero.single_partition_of_fp32_groups):
            rank, _ = replica_of(self._zero.real_dp_process_group[index])
            owned = Interval(rank * master.numel(), (rank + 1) * master.numel())
            parameters = [
                (self._names.of(parameter), tuple(meta.shape), parameter, offset)
                for parameter, meta, offset in self._parameters(index)
            ]
            names = tuple(name for name, *_ in parameters)
            slots = flat_slots(parameters, owned)
            group = hyper.of(master)
            own = self._momentum(index, slots) if group.get("use_muon") else {}
            found.append(Partition(master, slots, names, group, own=own))
        return found

    def residents(self) -> list[Resident]:
        groups = self._zero.round_robin_bit16_groups
        owned = (self._names.of(parameter) for group in groups for parameter in group)
        return replicated_residents(self._engine, self._names, owned)

    def group_names(self) -> list[list[str]]:
        groups = self._zero.round_robin_bit16_groups
        masters = self._zero.single_partition_of_fp32_groups
        return names_by_group(self.optimizer, self._names, zip(masters, groups, strict=True))

    def share_weights(self) -> None:
        parts = self._zero.parallel_partitioned_bit16_groups
        groups = self._zero.real_dp_process_group
        if spread(parts, groups):
            return
        all_gather_dp_groups(
            groups_flat=self._zero.bit16_groups_flat,
            partitioned_param_groups=parts,
            dp_process_group=groups,
            start_alignment_factor=self._zero.nccl_start_alignment_factor,
            allgather_bucket_size=self._zero.allgather_bucket_size,
        )

    def relink(self) -> None:
        relink_fragments(self._zero, self._zero.bit16_groups)

    def _parameters(self, index: int) -> list[tuple[Any, Any, int]]:
        """The parameters of a group with their shape and offset in its concatenation."""
        zero = self._zero
        parameters = zero.round_robin_bit16_groups[index]
        if hasattr(zero, "round_robin_bit16_offsets"):
            metas = zero.round_robin_bit16_meta[index]
            offsets = zero.round_robin_bit16_offsets[index]
        else:  # Before per-parameter alignment came, parameters lay end to end.
            metas = parameters
            offsets = [0, *accumulate(parameter.numel() for parameter in parameters)][:-1]
        return list(zip(parameters, metas, offsets, strict=True))

    def _momentum(self, index: int, slots: tuple[Slot, ...]) -> dict[str, OwnState]:
        """Muon's momentum: whole parameters end to end, in the dtype of their gradients.

        A parameter that lies in two partitions has its momentum in both. With CPU offload the
        momentum is laid out like the master.
        """
        zero = self._zero
        if zero.cpu_offload:
            return {}
        wholes, offset, dtype = [], 0, None
        for parameter in zero.params_in_partition[index]:
            interval = Interval(0, parameter.numel())
            wholes.append(Slot(self._names.of(parameter), shape_of(parameter), interval, offset))
            offset += parameter.numel()
            dtype = parameter.dtype
        if getattr(zero, "use_grad_accum_attribute", False):
            dtype = zero.gradient_accumulation_dtype
        starts = {whole.name: whole.offset for whole in wholes}
        held = tuple(
            replace(slot, offset=starts[slot.name] + slot.interval.start, weight=None)
            for slot in slots
        )
        is_made = int(self._engine.global_steps) > 0
        return {
            "momentum_buffer": OwnState(
                dtype or torch.float32, offset, held, tuple(wholes), is_made
            )
        }  # fmt: skip

    def _padding(self, index: int) -> int:
        """Elements of this rank's partition of a group that belong to no parameter."""
        zero = self._zero
        size = zero.single_partition_of_fp32_groups[index].numel()
        rank, _ = replica_of(zero.real_dp_process_group[index])
        owned = Interval(rank * size, (rank + 1) * size)
        inner = getattr(zero, "round_robin_bit16_padding", None)
        if inner is None:  # The tail alone, which an older `groups_padding` counts on one rank.
            total = sum(meta.numel() for _, meta, _ in self._parameters(index))
            return int(size - max(0, min(size, total - owned.start)))
        padding = int(zero.groups_padding[index])
        for (_, meta, offset), gap in zip(self._parameters(index), inner[index], strict=True):
            common = Interval(offset + meta.numel(), offset + meta.numel() + gap).intersect(owned)
            padding += common.count if common else 0
        return padding
