"""The training state, gathered from DeepSpeed's own tensors by where the weights lie in memory.

Nothing here knows of spotspeed: a parameter's place in a flat master is that of its weight in the
flat weights, told by addresses, and ZeRO-3 is asked through DeepSpeed's accessors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

Found = Iterator[tuple[str, torch.Tensor]]
KINDS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "sum", "momentum_buffer", "step")


def gather(engine: Any) -> dict[str, torch.Tensor]:
    """Every tensor of the state by "kind:name", flat. Collective."""
    found = dict(_trained(engine))
    names = {key.partition(":")[2] for key in found}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if name not in names and parameter.numel():
                found[f"weight:{name}"] = parameter.detach().clone().flatten()
    return found


def differences(engine: Any, tensors: dict[str, torch.Tensor]) -> tuple[int, list[str]]:
    """How many of `tensors` were compared, and which differ from what DeepSpeed holds."""
    found = gather(engine)
    stored = {key: values for key, values in tensors.items() if "@" not in key}
    if engine.zero_optimization_stage() == 3:  # Whose number it is no accessor tells.
        steps = {key: values for key, values in stored.items() if key.startswith("step:")}
        count = engine.global_steps - engine.skipped_steps
        found |= {key: torch.full_like(one, count) for key, one in steps.items()}
    faults = [f"{key}: not in both" for key in sorted(found.keys() ^ stored.keys())]
    both = found.keys() & stored.keys()
    faults += [key for key in sorted(both)
               if not torch.equal(found[key].double(), stored[key].double())]  # fmt: skip
    return len(both), faults


def _trained(engine: Any) -> Found:
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        yield from _stage3(engine)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        masters = optimizer.single_partition_of_fp32_groups
        yield from _partitioned(engine, masters, optimizer.bit16_groups_flat)
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        masters = optimizer.fp32_groups_flat_partition
        yield from _partitioned(engine, masters, optimizer.bf16_groups_flat)
    elif hasattr(optimizer, "fp32_groups_flat"):
        weights = optimizer.fp16_groups_flat
        for master, flat in zip(optimizer.fp32_groups_flat, weights, strict=True):
            yield from _flat(engine, _state(optimizer.optimizer, master), flat)
    else:
        yield from _whole(engine)


def _whole(engine: Any) -> Found:
    """Without ZeRO a master is as large as its weight, or is the weight."""
    optimizer, masters = engine.optimizer, {}
    for parameters, copies in zip(getattr(optimizer, "fp16_groups", ()),
                                  getattr(optimizer, "fp32_groups", ()), strict=True):  # fmt: skip
        masters.update(zip(map(id, parameters), copies, strict=True))
    inner = getattr(optimizer, "optimizer", optimizer)
    for name, parameter in engine.module.named_parameters():
        master = masters.get(id(parameter), parameter)
        if parameter.requires_grad and parameter.numel():
            for kind, values in _state(inner, master).items():
                yield f"{kind}:{name}", values.detach().flatten().clone()


def _partitioned(engine: Any, masters: list[Any], weights: list[Any]) -> Found:
    """ZeRO-1 and 2: each rank has a run of each flat master."""
    inner = engine.optimizer.optimizer
    for index, (master, flat) in enumerate(zip(masters, weights, strict=True)):
        state = _state(inner, master)
        momentum = state.get("momentum_buffer")
        if momentum is not None and momentum.shape != master.shape:
            yield from _momentum(engine, index, state.pop("momentum_buffer"))
        whole = {}
        for kind, values in state.items():
            parts = [torch.zeros_like(values) for _ in range(comm.get_world_size())]
            if values.dim():
                torch.distributed.all_gather(parts, values.detach().contiguous())
            whole[kind] = torch.cat(parts) if values.dim() else values
        yield from _flat(engine, whole, flat)


def _flat(engine: Any, state: dict[str, Any], weights: torch.Tensor) -> Found:
    """The runs of flat tensors that lie where the parameters lie in `weights`."""
    begin, item_bytes = weights.data_ptr(), weights.element_size()
    for name, parameter in engine.module.named_parameters():
        offset, rest = divmod(parameter.data_ptr() - begin, item_bytes)
        if rest or not 0 <= offset < weights.numel() or not parameter.numel():
            continue
        for kind, values in state.items():
            run = values[offset : offset + parameter.numel()] if values.dim() else values
            yield f"{kind}:{name}", run.detach().flatten().clone()


def _momentum(engine: Any, index: int, values: torch.Tensor) -> Found:
    """Muon's, which is whole on each rank that has a part of the parameter."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    own, offset = {}, 0
    for parameter in engine.optimizer.params_in_partition[index]:
        run = values[offset : offset + parameter.numel()]
        own[f"momentum_buffer:{names[id(parameter)]}"] = run.detach().clone()
        offset += parameter.numel()
    everywhere: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(everywhere, own)
    for rank in everywhere:
        yield from rank.items()


def _stage3(engine: Any) -> Found:
    kinds = [kind for kind in KINDS[:-1] if _has(engine, kind)]
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        yield f"fp32:{name}", safe_get_full_fp32_param(parameter).flatten()
        for kind in kinds:
            try:
                value = safe_get_full_optimizer_state(parameter, kind)
            except KeyError:  # on every rank alike: Muon keeps other state for other groups
                continue
            yield f"{kind}:{name}", value.flatten()


def _has(engine: Any, kind: str) -> bool:
    """Whether the optimizer of any rank has state of that kind: then all ask for it."""
    own = any(kind in state for state in engine.optimizer.optimizer.state.values())
    answers: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(answers, own)
    return any(answers)


def _state(optimizer: Any, master: torch.Tensor) -> dict[str, torch.Tensor]:
    """The master and what the optimizer keeps beside it."""
    state = optimizer.state.get(master) or {}
    found = {kind: torch.as_tensor(state[kind]) for kind in KINDS if state.get(kind) is not None}
    return {"fp32": master, **found}
