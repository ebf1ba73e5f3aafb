"""Train cases on these ranks and write what their providers captured: `state_record.py OUT NAMES`.

Writes OUT/w<ranks>.pt: {case: {"start", "middle", "end": Snapshot, "losses", "independent"}}.
"""

from __future__ import annotations

import gc
import logging
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from state_model import FULL_CASES, Case, build, train
from state_snapshot import Snapshot, snapshot

from spotspeed.state.provider import provider_for

STEPS = 3
"""Steps before the snapshot in the middle, and again after it."""


def record(case: Case) -> dict[str, Any]:
    engine = build(case)
    provider = provider_for(engine)
    start = snapshot(provider)
    losses = train(engine, STEPS)
    middle = snapshot(provider)
    independent = compare(engine, case, middle)
    losses += train(engine, STEPS)
    result = {
        "start": start, "middle": middle, "end": snapshot(provider), "losses": losses,
        "independent": independent, "describe": provider.describe(), "name": provider.name,
    }  # fmt: skip
    engine.destroy()
    return result


def compare(engine: Any, case: Case, state: Snapshot) -> tuple[int, list[str]]:
    """Compare with DeepSpeed's own accessors, where these are right; (compared, differences)."""
    stage = engine.zero_optimization_stage()
    if "rr" in case.name or stage == 0:
        return 0, []
    compared, faults = 0, []
    for name, parameter in engine.module.named_parameters():
        if f"fp32:{name}" not in state.tensors:
            continue
        pairs = {"fp32": safe_get_full_fp32_param(parameter)}
        # DeepSpeed links the state of groups after the first before it exists (ZeRO-1 and 2).
        if case.optimizer in ("adamw", "cpuadam") and (stage == 3 or name.endswith("weight")):
            for kind in ("exp_avg", "exp_avg_sq"):
                pairs[kind] = safe_get_full_optimizer_state(parameter, kind)
        for kind, value in pairs.items():
            compared += 1
            if not torch.equal(value.flatten().float(), state.tensors[f"{kind}:{name}"].float()):
                faults.append(f"{kind}:{name}")
    return compared, faults


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2].split(",")
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo")
    gc.freeze()  # ZeRO-3 collects garbage as it starts; what is imported is none.
    results = {name: record(FULL_CASES[name]) for name in names}
    if deepspeed.comm.get_rank() == 0:
        torch.save(results, out / f"w{deepspeed.comm.get_world_size()}.pt")
    deepspeed.comm.barrier()


if __name__ == "__main__":
    main()
