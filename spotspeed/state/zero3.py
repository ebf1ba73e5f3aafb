"""ZeRO stage 3: one flat master per sub-group of parameter shards (DeepSpeedZeroOptimizer_Stage3).

Each parameter is sharded by itself: rank r of W holds elements [r * n, (r + 1) * n) with n the
rounded-up quotient of its size by W; what lies beyond its end is uninitialised memory.
"""

from __future__ import annotations

from typing import Any

import torch

from spotspeed.core.interval import Interval
from spotspeed.errors import CaptureError
from spotspeed.state.nvme import swapped_group
from spotspeed.state.parameters import ParameterNames, count_of, replica_of, shape_of
from spotspeed.state.partition import OwnState, Partition, Resident, Slot
from spotspeed.state.probe import check_geometry, require


class Zero3Layout:
    """Sub-groups are cut by shard size, so they move with the number of ranks; names do not."""

    name = "zero3"

    def __init__(self, engine: Any) -> None:
        self._engine, self._zero = engine, engine.optimizer
        self._names = ParameterNames(engine)
        require(
            self._zero, "optimizer", "fp32_partitioned_groups_flat", "fp16_groups",
            "sub_group_to_group_id", "checkpoint_event_prologue", "checkpoint_event_epilogue",
        )  # fmt: skip
        for group, partition in zip(self._zero.fp16_groups, self.partitions(), strict=True):
            shards = sum(int(parameter.partition_numel()) for parameter in group)
            held = sum(slot.interval.count for slot in partition.slots)
            check_geometry(partition, shards - held)

    @property
    def optimizer(self) -> Any:
        return self._zero.optimizer

    def partitions(self) -> list[Partition]:
        found = []
        for index, live in enumerate(self._zero.fp32_partitioned_groups_flat):
            slots, offset = [], 0
            swapped = swapped_group(self._zero, index)
            master = live if swapped is None else swapped.master()
            for parameter in self._zero.fp16_groups[index]:
                interval = _shard(parameter)
                if interval.count:
                    weight = parameter.ds_tensor.detach().narrow(0, 0, interval.count)
                    name, shape = self._names.of(parameter), shape_of(parameter)
                    slots.append(Slot(name, shape, interval, offset, weight))
                offset += int(parameter.partition_numel())
            names = tuple(self._names.of(parameter) for parameter in self._zero.fp16_groups[index])
            own = self._momentum(index, master, tuple(slots))
            found.append(Partition(master, tuple(slots), names, self._hyper(index), own=own,
                                   swapped=swapped))  # fmt: skip
        return found

    def residents(self) -> list[Resident]:
        trained = {id(parameter) for group in self._zero.fp16_groups for parameter in group}
        found = []
        for name, parameter in self._names:
            if id(parameter) in trained or not count_of(parameter):
                continue
            if getattr(parameter, "ds_tensor", None) is None:
                raise CaptureError(f"{name}: not partitioned by ZeRO-3, and not trained")
            interval = _shard(parameter)
            if interval.count:
                shard = parameter.ds_tensor.detach().narrow(0, 0, interval.count)
                found.append(Resident(name, shape_of(parameter), interval, shard))
        return found

    def group_names(self) -> list[list[str]]:
        names: list[list[str]] = [[] for _ in self.optimizer.param_groups]
        for index, group in enumerate(self._zero.fp16_groups):
            names[self._group_of(index)].extend(self._names.of(parameter) for parameter in group)
        return names

    def share_weights(self) -> None:
        """Drop gathered and secondary copies of the old weights and gather persistent ones."""
        self._zero.checkpoint_event_prologue()
        for _, parameter in self._names:
            if getattr(parameter, "ds_secondary_tensor", None) is not None:
                parameter.ds_secondary_tensor = None
        self._zero.checkpoint_event_epilogue()

    def relink(self) -> None:
        """Nothing to do: DeepSpeed looks its ZeRO-3 state up at every access."""

    def _momentum(
        self, index: int, master: torch.Tensor, slots: tuple[Slot, ...]
    ) -> dict[str, OwnState]:
        """Muon's momentum: laid out like the master, in the dtype of the communication."""
        if not self._hyper(index).get("use_muon"):
            return {}
        dtype = self._zero.communication_data_type
        return {"momentum_buffer": OwnState(dtype, master.numel(), slots, slots)}

    def _group_of(self, sub_group: int) -> int:
        # DeepSpeed rebuilds Adagrad with one group for all; the ids still count the old ones.
        last = len(self.optimizer.param_groups) - 1
        return min(int(self._zero.sub_group_to_group_id[sub_group]), last)

    def _hyper(self, sub_group: int) -> Any:
        return self.optimizer.param_groups[self._group_of(sub_group)]


def _shard(parameter: Any) -> Interval:
    """The elements of the whole parameter that this rank's shard holds."""
    rank, _ = replica_of(parameter.ds_process_group)
    size, total = int(parameter.partition_numel()), count_of(parameter)
    return Interval(min(rank * size, total), min((rank + 1) * size, total))
