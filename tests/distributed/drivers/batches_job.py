"""Train on `checkpointer.batches()` and log which samples each step saw, on every rank.

Without workers: on a DataLoader of the script's own that has a GlobalSampler.
"""

import json
import os
import pathlib
import sys

import deepspeed
import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset

import spotspeed

PATH, LOG, STOP_AT, WORKERS = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
SIZE, GLOBAL_BATCH, EPOCHS = 50, 12, 3


class Numbers(Dataset):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), 1.0])


def own_batches(engine) -> DataLoader:
    sampler = spotspeed.GlobalSampler(
        SIZE, global_batch=engine.train_batch_size(), rank=distributed.get_rank(),
        micro_batch=engine.train_micro_batch_size_per_gpu(), epochs=EPOCHS,
        world_size=distributed.get_world_size(), start_sample=engine.global_samples,
    )  # fmt: skip
    return DataLoader(Numbers(), batch_sampler=sampler)


def main() -> None:
    deepspeed.init_distributed(distributed_port=int(os.environ["MASTER_PORT"]))
    torch.manual_seed(1)
    model = torch.nn.Linear(2, 1)
    config = {
        "train_batch_size": GLOBAL_BATCH, "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": 2}, "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "spotspeed": {"path": PATH, "interval": {"seconds": None},
                      "elastic": {"indivisible": "micro_batch"}},
    }  # fmt: skip
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    loader = DataLoader(Numbers(), batch_size=3, shuffle=True, num_workers=int(WORKERS))
    checkpointer = spotspeed.attach(engine, loader=loader)
    checkpointer.restore()
    rank = distributed.get_rank()
    batches = checkpointer.batches(epochs=EPOCHS) if WORKERS != "0" else own_batches(engine)
    with (LOG / f"{distributed.get_world_size()}-{rank}.jsonl").open("a") as log:
        for batch in batches:
            step = engine.global_steps + 1
            loss = engine(batch).mean()
            engine.backward(loss)
            engine.step()
            log.write(json.dumps({"step": step, "samples": batch[:, 0].int().tolist()}) + "\n")
            if engine.global_steps == STOP_AT:
                break
    checkpointer.close()


main()
