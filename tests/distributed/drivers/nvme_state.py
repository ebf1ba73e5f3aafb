"""ZeRO-Infinity on NVMe through real saves and restores: `nvme_state.py record|resume DIR PAIRS`.

Writes DIR/<mode>-w<ranks>.pt. A recorded case has the losses of steps 4 to 6 and all masters and
moments after step 3 and after step 6, read through DeepSpeed's own accessors; a resumed pair, from
a checkpoint of step 3, the same.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

import spotspeed

STEPS = 3
TAG = "middle"
WIDTH, ROWS = 512, 2300
"""One weight that makes a swapped sub-group on up to four ranks; the rest stays in memory."""


def build(case: str, folder: Path, path: Path, *, seed: int) -> Any:
    offload: dict[str, Any] = {"device": "cpu"}
    if case.startswith("nvme"):
        is_pipelined = "pipelined" in case
        offload = {"device": "nvme", "nvme_path": str(folder / "nvme" / f"{case}-{seed}"),
                   "buffer_count": 8, "pipeline_read": is_pipelined,
                   "pipeline_write": is_pipelined}  # fmt: skip
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, ROWS), torch.nn.Tanh(),
                                torch.nn.Linear(ROWS, 8))  # fmt: skip
    config = {
        "train_batch_size": 12, "train_micro_batch_size_per_gpu": 12 // comm.get_world_size(),
        "steps_per_print": 10**9, "bf16": {"enabled": True}, "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "sub_group_size": 200_000, "offload_optimizer": offload},
        "aio": {"block_size": 1 << 20},
        "spotspeed": {"path": str(path), "interval": {"seconds": None}},
    }  # fmt: skip
    if case.endswith("cpuadam"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: Any = DeepSpeedCPUAdam(model.parameters(), lr=1e-3)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train(engine: Any, steps: int) -> list[float]:
    losses = []
    rank, share = comm.get_rank(), 12 // comm.get_world_size()
    for _ in range(steps):
        generator = torch.Generator().manual_seed(1000 + engine.global_steps)
        batch = torch.randn(12, WIDTH, generator=generator).bfloat16()
        loss = engine(batch[rank * share : (rank + 1) * share]).float().pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def gather(engine: Any) -> dict[str, torch.Tensor]:
    """Every master and moment, whole, as DeepSpeed itself reads them."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        found[f"fp32:{name}"] = safe_get_full_fp32_param(parameter).clone()
        for kind in ("exp_avg", "exp_avg_sq"):
            found[f"{kind}:{name}"] = safe_get_full_optimizer_state(parameter, kind).clone()
    return found


def swapped(engine: Any) -> int:
    """How many sub-groups of this rank are in files."""
    swapper = engine.optimizer.optimizer_swapper
    return 0 if swapper is None else len(swapper.swap_params_info)


def record(case: str, folder: Path) -> dict[str, Any]:
    path = folder / f"{case}-w{comm.get_world_size()}"
    engine = build(case, folder, path, seed=11)
    checkpointer = spotspeed.attach(engine)
    checkpointer.restore()
    train(engine, STEPS)
    middle = gather(engine)
    handle = checkpointer.save(TAG)
    losses = train(engine, STEPS)
    handle.wait(300)
    result = {"middle": middle, "losses": losses, "end": gather(engine), "swapped": swapped(engine)}
    checkpointer.close()
    engine.destroy()
    return result


def resume(ranks: int, source: str, target: str, folder: Path) -> dict[str, Any]:
    engine = build(target, folder, folder / f"{source}-w{ranks}", seed=99)
    checkpointer = spotspeed.attach(engine)
    restored = checkpointer.restore(TAG)
    assert restored is not None and restored.step == engine.global_steps == STEPS
    middle = gather(engine)
    losses = train(engine, STEPS)
    result = {"middle": middle, "losses": losses, "end": gather(engine), "swapped": swapped(engine)}
    checkpointer.close()
    engine.destroy()
    return result


def main() -> None:
    mode, folder, wanted = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo")
    gc.freeze()  # ZeRO-3 collects garbage as it starts; what is imported is none.
    if mode == "record":
        results: dict[Any, Any] = {case: record(case, folder) for case in wanted}
    else:
        results = {tuple(pair): resume(*pair, folder) for pair in wanted}
    if comm.get_rank() == 0:
        torch.save(results, folder / f"{mode}-w{comm.get_world_size()}.pt")
    comm.barrier()


if __name__ == "__main__":
    main()
