"""A job that trains an adapter beside a frozen base: what each save writes, and what comes back.

`frozen.py PATH STAGE write|resume OUT`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
from engines import RANK, WORLD_SIZE

import spotspeed
from spotspeed import events


class Lora(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.ModuleList(torch.nn.Linear(384, 384) for _ in range(4))
        self.base.requires_grad_(False)
        self.down = torch.nn.Linear(384, 2, bias=False)
        self.up = torch.nn.Linear(2, 384, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.base:
            x = torch.relu(layer(x)) + self.up(self.down(x))
        return x


def make(path: str, stage: int, seed: int):
    torch.manual_seed(seed)
    model = Lora()
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9, "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "spotspeed": {"path": path, "interval": {"seconds": None}, "keep": {"last": 10}},
    }  # fmt: skip
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


def step(engine) -> None:
    x = torch.ones(1, 384).bfloat16() * (RANK + 1 + engine.global_steps)
    engine.backward(engine(x).float().pow(2).mean())
    engine.step()


def digests(engine) -> dict[str, float]:
    """The sum of every parameter of this rank, whole; gathered where it is partitioned."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().double().sum().item()
    return found


def written(path: str) -> int:
    return sum(file.stat().st_size for file in Path(path).rglob("*.shard"))


def main(path: str, stage: int, mode: str, out: str) -> None:
    engine = make(path, stage, seed=1 if mode == "write" else 2)
    checkpointer = spotspeed.attach(engine)
    read: list[int] = []
    events.add_sink(
        lambda event: read.append(event.size_bytes) if type(event) is events.Resumed else None
    )
    restored = checkpointer.restore()
    reads: list[list[int]] = [[]] * WORLD_SIZE
    torch.distributed.all_gather_object(reads, read)
    sums = digests(engine)
    sizes = [written(path)]
    for _ in range(3):
        step(engine)
        checkpointer.save(f"{mode}-{engine.global_steps}").wait(120)
        torch.distributed.barrier()
        sizes.append(written(path))
        torch.distributed.barrier()
    if mode == "write":
        step(engine)
        with torch.no_grad():
            for parameter in engine.module.base[1].parameters():
                getattr(parameter, "ds_tensor", parameter).data.mul_(2)
        checkpointer.save("edited").wait(120)
        torch.distributed.barrier()
        sizes.append(written(path))
        sums = digests(engine) if stage < 3 else {}
    checkpointer.close()
    if RANK == 0:
        facts = {"step": restored.step if restored else None, "sizes": sizes, "sums": sums,
                 "ranks": WORLD_SIZE, "read": sum(map(sum, reads))}  # fmt: skip
        Path(out).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
