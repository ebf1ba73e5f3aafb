"""Checks made once, when a provider is attached: nothing is guessed about DeepSpeed's inside."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import deepspeed

from spotspeed.errors import UnsupportedLayoutError
from spotspeed.state.partition import Partition

SUPPORTED = (
    "supported are ZeRO stages 0 to 3 and BF16_Optimizer in device memory or with CPU offload, "
    "the optimizer of stage 3 on NVMe, in data parallelism, with pipelines, experts or AutoTP"
)
SWAPPABLE = ("Adam", "AdamW", "DeepSpeedCPUAdam")
"""Optimizers whose state may lie on NVMe: it is made in the first step, all of it by its master."""


def require(owner: Any, *attributes: str) -> None:
    """Raise UnsupportedLayoutError unless `owner` has every attribute that will be read."""
    missing = [name for name in attributes if not hasattr(owner, name)]
    if missing:
        raise UnsupportedLayoutError(
            f"{type(owner).__name__} of DeepSpeed {deepspeed.__version__} has no "
            f"{', '.join(missing)}: this version of DeepSpeed keeps its state elsewhere"
        )


def check_geometry(partition: Partition, padding: int) -> None:
    """Raise UnsupportedLayoutError unless slots and padding make up the whole master."""
    slots = sum(slot.interval.count for slot in partition.slots)
    if slots + padding != partition.master.numel():
        raise UnsupportedLayoutError(
            f"a partition of {partition.master.numel()} elements holds {slots} elements of "
            f"parameters and {padding} of padding: DeepSpeed {deepspeed.__version__} lays it out "
            f"in a way that is not known here"
        )


def refuse_unsupported(engine: Any) -> None:
    """Raise UnsupportedLayoutError naming every part of the setup that is not supported."""
    found = list(_unsupported(engine))
    if found:
        raise UnsupportedLayoutError(f"not supported: {'; '.join(found)}; {SUPPORTED}")


def moves_during_forward(optimizer: Any) -> bool:
    """Whether a pass of DeepCompile, chosen after the engine was made, moves the state about."""
    passes: Any = sys.modules.get("deepspeed.compile.passes.offload_adam_states")
    return passes is not None and getattr(passes, "optimizer", None) is optimizer


def has_optimizer(engine: Any) -> bool:
    """Whether the engine trains: DeepSpeed wraps what has no optimizer in several ways."""
    names = _names_of(engine.optimizer)
    return not (engine.optimizer is None or "dummyoptim" in names or "zerooffload" in names)


def _names_of(optimizer: Any) -> str:
    """The classes of DeepSpeed's wrapper and of what it wraps, in small letters."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return f"{type(optimizer).__name__} {type(inner).__name__}".lower()


def _unsupported(engine: Any) -> Iterable[str]:
    optimizer = engine.optimizer
    names = _names_of(optimizer)
    compile_config: Any = getattr(engine._config, "compile_config", None)
    if not has_optimizer(engine):
        yield "an engine without an optimizer (there is nothing to resume)"
    yield from _unsupported_tensors(engine)
    yield from _unsupported_sequences(engine)
    yield from _unsupported_experts(engine)
    if type(engine).__name__ == "DeepSpeedHybridEngine":
        yield "the hybrid engine (it keeps inference copies of the weights)"
    if getattr(engine, "zenflow", False) or "zenflow" in names:
        yield "ZenFlow (it updates outside of the optimizer step)"
    if "superoffload" in names:
        yield "SuperOffload (it updates during backward)"
    if "onebit" in names or "zeroone" in names:
        inner = getattr(optimizer, "optimizer", optimizer)
        yield f"{type(inner).__name__} (1-bit state is local to each rank)"
    if "muon" in names and getattr(optimizer, "save_muon_momentum_buffer_in_memory", False):
        yield "Muon with save_muon_momentum_buffer_in_memory"
    if getattr(compile_config, "deepcompile", False) and compile_config.offload_opt_states:
        yield "DeepCompile's offload_opt_states (it moves the state during forward)"
    if any(hasattr(parameter, "ds_optim_param") for parameter in engine.module.parameters()):
        yield "OptimizedLinear (its frozen weights are sharded beside ZeRO)"
    yield from _unsupported_offload(optimizer)


def _unsupported_sequences(engine: Any) -> Iterable[str]:
    size = int(getattr(engine, "sequence_parallel_size", 1) or 1)
    if size > 1 and engine.zero_optimization_stage() < 3:
        yield f"sequences shared by {size} ranks in ZeRO stage {engine.zero_optimization_stage()}"


def _unsupported_experts(engine: Any) -> Iterable[str]:
    if not getattr(engine, "has_moe_layers", False):
        return
    if engine.zero_optimization_stage() == 3:
        yield "mixture of experts in ZeRO stage 3"
    names = {type(module).__name__ for module in engine.module.modules()}
    if "AutoEPMoELayer" in names:
        yield "AutoEP (it numbers its experts in another way)"


def _unsupported_tensors(engine: Any) -> Iterable[str]:
    if getattr(engine, "pipeline_parallelism", False):  # Stages count as model parallel there.
        size = int(engine.grid.model_parallel_size)
        if size > 1:
            yield f"tensor parallelism of {size} in a pipeline"
        return
    auto = _size(engine, "autotp_size")
    size = max(int(getattr(engine, "mp_world_size", 1)), auto)
    if size > 1 and size != auto:
        yield f"tensor parallelism of {size} by something else than AutoTP"
    if auto > 1 and engine.zero_optimization_stage() == 3:
        yield f"AutoTP of {auto} in ZeRO stage 3"
    if auto > 1 and getattr(engine, "has_moe_layers", False):
        yield f"AutoTP of {auto} with a mixture of experts"


def _unsupported_offload(optimizer: Any) -> Iterable[str]:
    if getattr(optimizer, "swap_optimizer", False):
        yield from _unsupported_swap(optimizer)
    if getattr(optimizer, "params_in_nvme_and_cpu", False):
        yield "parameters on NVMe (offload_param.device nvme)"
    if set(getattr(optimizer, "subgroup_to_device", {}).values()) - {"cpu"}:
        yield "an offload_optimizer.ratio below 1 (state in two optimizers)"
    if getattr(optimizer, "zero_quantized_nontrainable_weights", False):
        yield "zero_quantized_nontrainable_weights"


def _unsupported_swap(optimizer: Any) -> Iterable[str]:
    kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
    swapper = getattr(optimizer, "optimizer_swapper", None)
    if kind not in SWAPPABLE:
        yield f"the state of {kind} on NVMe (of {', '.join(SWAPPABLE)} it is)"
    missing = [name for name in ("swap_params_info", "swap_in_optimizer_state",
                                 "swap_out_optimizer_state")
               if not hasattr(swapper, name)]  # fmt: skip
    if missing:
        yield f"a swapper without {', '.join(missing)}"


def _size(engine: Any, method: str) -> int:
    return int(getattr(engine, method, lambda: 1)() or 1)
