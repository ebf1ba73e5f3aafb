"""Masters and optimizer state that ZeRO-Infinity keeps in files on NVMe (offload_optimizer nvme).

From the exit of one optimizer step to the entry of the next, DeepSpeed's swapper has every large
sub-group's master and state in files of raw elements, and empty tensors in their place. The files
are mapped into memory: captured as if they were tensors, and restored by writing to the mapping.
DeepSpeed reads and writes them with O_DIRECT; the kernel keeps mappings and direct access to one
file coherent. Small sub-groups stay in host memory and are not concerned.

Source: PartitionedOptimizerSwapper and PipelinedOptimizerSwapper of DeepSpeed 0.19.8; the last
swap-out of a step is awaited by both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spotspeed.errors import CaptureError


def swapped_group(zero: Any, index: int) -> SwappedGroup | None:
    """The files of one sub-group of a ZeRO-3 optimizer; None where it lies in memory."""
    if not getattr(zero, "swap_optimizer", False):
        return None
    key, swapper = zero.fp32_partitioned_groups_flat[index], zero.optimizer_swapper
    info = swapper.swap_params_info.get(getattr(key, "ds_id", None))
    if info is None:
        return None
    # One swapper notes the buffers that hold a sub-group, the other what it has under way.
    if info.swap_buffers or any(getattr(swapper, "swap_ops", {}).values()):
        raise CaptureError(f"sub-group {index} of the optimizer is swapped in: only between steps")
    return SwappedGroup(zero, key, int(zero.fp16_partitioned_groups_flat_numel[index]))


@dataclass(frozen=True, slots=True)
class SwappedGroup:
    """One sub-group; `key` is the tensor that DeepSpeed fills when it swaps in."""

    zero: Any
    key: torch.Tensor
    count: int

    def master(self) -> torch.Tensor:
        """A view of the master's file."""
        return self._map(self._info.tensors[0], self.key.dtype, "the master")

    def state(self) -> Mapping[str, torch.Tensor]:
        """Views of the files of the optimizer's state, by kind."""
        state, found = self.zero.optimizer.state.get(self.key) or {}, {}
        for context in self._info.tensors[1:]:
            for kind, value in state.items():
                if value is context.compute_tensor:
                    found[str(kind)] = self._map(context, value.dtype, str(kind))
        return found

    def make(self, kinds: Sequence[str]) -> None:
        """Swap in, make the state that is missing, swap out: DeepSpeed then has files for it."""
        state = self.zero.optimizer.state[self.key]
        missing = [kind for kind in kinds if state.get(kind) is None]
        if not missing:
            return
        swapper = self.zero.optimizer_swapper
        swapper.swap_in_optimizer_state(self.key, None)
        for kind in missing:
            state[kind] = torch.zeros_like(self.key.detach())
        swapper.swap_out_optimizer_state(self.key, False)

    def drop(self) -> None:
        """Forget the files of the state; DeepSpeed makes them anew in the next step."""
        info = self._info
        del info.tensors[1:]
        info.has_state_tensors = False

    @property
    def _info(self) -> Any:
        """What DeepSpeed's swapper knows of this sub-group: its files, the master's first."""
        return self.zero.optimizer_swapper.swap_params_info[self.key.ds_id]  # type: ignore[attr-defined]

    def _map(self, context: Any, dtype: torch.dtype, what: str) -> torch.Tensor:
        path, size_bytes = Path(context.swap_path), self.count * dtype.itemsize
        found_bytes = path.stat().st_size if path.exists() else -1
        if found_bytes < size_bytes:
            raise CaptureError(
                f"{path}: {found_bytes} bytes of {what}, expected {size_bytes}: the file that "
                f"DeepSpeed swaps to is gone or cut off"
            )
        return torch.from_file(str(path), shared=True, size=self.count, dtype=dtype)
