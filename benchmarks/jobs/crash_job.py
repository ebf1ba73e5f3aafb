"""The job of crash_states.py: two saves one after the other, by one of three savers.

`crash_job.py FOLDER deepspeed|dcp|spotspeed` leaves a mark for strace when a save has returned.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

MARK = "/spotspeed-mark/"
SAVES = 2
ELEMENTS = 40_000


def say(word: str) -> None:
    os.access(MARK + word, os.F_OK)


def state(number: int) -> dict[str, torch.Tensor]:
    """What save `number` holds: 0.3 MB, every element telling the save."""
    return {f"layer.{n}": torch.arange(ELEMENTS) + 1000.0 * number + n for n in range(2)}


def with_deepspeed(folder: Path) -> None:
    import deepspeed

    model = torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.Linear(96, 96))
    config = {
        "train_batch_size": 1, "steps_per_print": 10**9, "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }  # fmt: skip
    engine: Any = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )[0]
    for number in range(1, SAVES + 1):
        engine.backward(engine(torch.ones(1, 96).bfloat16()).float().pow(2).mean())
        engine.step()
        engine.save_checkpoint(str(folder), tag=f"save-{number}")
        say(f"returned save-{number}")


def with_dcp(folder: Path) -> None:
    from torch.distributed import checkpoint

    for number in range(1, SAVES + 1):
        checkpoint.save(state(number), checkpoint_id=str(folder / f"save-{number}"))
        say(f"returned save-{number}")


def with_spotspeed(folder: Path) -> None:
    from spotspeed.checkpoint.ownership import claim_epoch, record_restored_from
    from spotspeed.config import parse_block
    from spotspeed.core.interval import Interval
    from spotspeed.core.layout import Fragment, TensorKey
    from spotspeed.core.manifest import Ticket
    from spotspeed.staging.stager import Stager
    from spotspeed.storage import open_storage

    storage = open_storage(str(folder))
    epoch = claim_epoch(storage).epoch
    record_restored_from(storage, epoch, None)
    stager = Stager(str(folder), parse_block({"path": str(folder)}), 0)
    for number in range(1, SAVES + 1):
        pieces = [
            (
                Fragment(TensorKey("fp32", name), "float32", (ELEMENTS,), Interval(0, ELEMENTS)),
                value,
            )
            for name, value in state(number).items()
        ]
        ticket = Ticket(epoch, number, "p", f"save-{number}", "periodic", 1, 1_700_000_000)
        stager.stage(ticket, pieces, {}).upload_completion.result(60)
        say(f"returned save-{number}")
    stager.close()


if __name__ == "__main__":
    {"deepspeed": with_deepspeed, "dcp": with_dcp, "spotspeed": with_spotspeed}[sys.argv[2]](
        Path(sys.argv[1])
    )
