"""Save divided models and resume them elsewhere: `mesh_state.py record|resume FOLDER JSON`.

`record` trains each case of the JSON list, saves in the middle and goes on. `resume` takes pairs
[ranks that wrote, case that wrote, case that reads]. Both write FOLDER/<mode>-w<ranks>.pt.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from mesh_model import build, train
from state_snapshot import snapshot

import spotspeed
from spotspeed.errors import SpotSpeedError
from spotspeed.state.provider import provider_for

STEPS, TAG = 3, "middle"


def record(folder: Path, name: str) -> dict[str, Any]:
    engine = build(name, str(folder / f"{name}-w{comm.get_world_size()}"), seed=11)
    checkpointer = spotspeed.attach(engine)
    losses = train(engine, STEPS)
    checkpointer.save(TAG).wait(120)
    middle = observe(engine)
    losses += train(engine, STEPS)
    result = {"middle": middle, "end": observe(engine), "losses": losses,
              "describe": provider_for(engine, tell_all).describe()}  # fmt: skip
    engine.destroy()
    return result


def resume(folder: Path, ranks: int, source: str, target: str) -> dict[str, Any]:
    odd_rank, _, target = target.rpartition("@")
    engine = build(target, str(folder / f"{source}-w{ranks}"), seed=99)
    if odd_rank and comm.get_rank() == int(odd_rank):
        engine.zenflow = True  # What no rank supports, found by this one alone.
    try:
        checkpointer = spotspeed.attach(engine)
        checkpointer.restore(TAG)
    except SpotSpeedError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    restored = observe(engine)
    result = {"restored": restored, "losses": train(engine, STEPS), "end": observe(engine)}
    engine.destroy()
    return result


def tell_all(mine: Any) -> list[Any]:
    """Every rank's value, as the control plane would bring it."""
    found: list[Any] = [None] * comm.get_world_size()
    comm.all_gather_object(found, json.dumps(mine))
    return [json.loads(value) for value in found]


def observe(engine: Any) -> dict[str, Any]:
    """The whole state on all ranks, and what of it an independent gather reads otherwise."""
    state = snapshot(provider_for(engine, tell_all))
    faults = list(state.faults)
    for rank, tensors in enumerate(_from_everywhere(gather(engine))):
        for key, values in tensors.items():
            if key not in state.tensors or not torch.equal(values, state.tensors[key]):
                faults.append(f"{key}: rank {rank} holds other values than were captured")
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    own = {
        "groups": [(group["lr"], group["weight_decay"]) for group in inner.param_groups],
        "counts": (engine.global_steps, engine.global_samples, engine.skipped_steps),
        "scale": getattr(engine.optimizer, "cur_scale", None),
        "schedule": engine.lr_scheduler.state_dict(),
        "buffers": {name: buffer.clone() for name, buffer in engine.module.named_buffers()},
    }
    return {"state": state, "faults": faults, "ranks": _from_everywhere(own)}


def gather(engine: Any) -> dict[str, torch.Tensor]:
    """Whole tensors of this rank's part, from DeepSpeed's flat groups and by plain arithmetic."""
    optimizer = engine.optimizer
    names = {id(parameter): _global_name(engine, name)
             for name, parameter in engine.module.named_parameters()}  # fmt: skip
    found = {f"weight:{names[id(p)]}": p.detach().flatten()
             for p in engine.module.parameters() if not p.requires_grad}  # fmt: skip
    flats = getattr(optimizer, "single_partition_of_fp32_groups",
                    getattr(optimizer, "fp32_groups_flat_partition", None))  # fmt: skip
    if flats is None:
        masters = getattr(optimizer, "fp32_groups", None)
        weights = getattr(optimizer, "fp16_groups", None)
        inner = getattr(optimizer, "optimizer", optimizer)
        for index, group in enumerate(inner.param_groups):
            own = group["params"] if masters is None else masters[index]
            shown = own if weights is None else weights[index]
            for master, weight in zip(own, shown, strict=True):
                pairs = {"fp32": master, **inner.state[master]}
                for kind, value in pairs.items():
                    found[f"{kind}:{names[id(weight)]}"] = value.detach().flatten().clone()
        return found
    groups = getattr(optimizer, "bit16_groups", getattr(optimizer, "bf16_groups", None))
    for index, flat in enumerate(flats):
        kinds = {"fp32": flat, **optimizer.optimizer.state[flat]}
        for kind, values in kinds.items():
            if values.dim() == 0:
                found |= {f"{kind}:{names[id(p)]}": values.reshape(1) for p in groups[index]}
                continue
            whole = _concatenation(values.detach(), optimizer.real_dp_process_group[index])
            for parameter in groups[index]:
                found[f"{kind}:{names[id(parameter)]}"] = whole[: parameter.numel()].clone()
                whole = whole[parameter.numel() :]
    return found


def _concatenation(part: torch.Tensor, group: Any) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(comm.get_world_size(group=group))]
    comm.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


def _global_name(engine: Any, name: str) -> str:
    """Expert `i` of the ranks' `n` each is number `rank * n + i` of the job."""
    if engine.autotp_size() > 1:
        return f"tensor_parallel_{comm.get_rank() % engine.autotp_size()}.{name}"
    if ".deepspeed_experts." not in name:
        return name
    prefix, _, rest = name.partition(".deepspeed_experts.")
    number, _, rest = rest.partition(".")
    local = engine.module.get_submodule(prefix).num_local_experts
    moe = engine.module.get_submodule(prefix.removesuffix(".deepspeed_moe.experts"))
    first = comm.get_rank() % moe.ep_size * local
    return f"{prefix}.deepspeed_experts.{first + int(number)}.{rest}"


def _from_everywhere(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def main() -> None:
    mode, folder, wanted = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo")
    results: dict[Any, Any] = {}
    for item in wanted:
        if mode == "record":
            results[item] = record(folder, item)
        else:
            results[tuple(item)] = resume(folder, *item)
    if comm.get_rank() == 0:
        torch.save(results, folder / f"{mode}-w{comm.get_world_size()}.pt")
    comm.barrier()


if __name__ == "__main__":
    main()
