"""Train a pipeline of two stages with spotspeed; takes the words that tests.distributed.job gives.

Every step appends {"step", "loss"} to the log. Interrupted, it is simply started again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from mesh_model import Block, _loss
from torch import nn
from torch.utils.data import DataLoader, Dataset

import spotspeed


class Tokens(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Numbers and what follows each."""

    def __len__(self) -> int:
        return 600

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(index % 7), torch.tensor(index * index % 7)


def main() -> None:
    parser = argparse.ArgumentParser()
    for word in ("--config", "--steps", "--log"):
        parser.add_argument(word, required=True)
    words, _ = parser.parse_known_args()
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(5)
    layers = [LayerSpec(nn.Embedding, 7, 6), LayerSpec(Block), LayerSpec(Block),
              LayerSpec(nn.Linear, 6, 7)]  # fmt: skip
    module = PipelineModule(layers, num_stages=2, loss_fn=_loss, partition_method="uniform")
    engine, *_ = deepspeed.initialize(
        model=module, config=words.config,
        model_parameters=[p for p in module.parameters() if p.requires_grad],
    )  # fmt: skip
    loader = DataLoader(Tokens(), batch_size=1, shuffle=True)
    checkpointer = spotspeed.attach(engine, loader=loader)
    checkpointer.restore()
    batches = checkpointer.batches(epochs=None)
    while engine.global_steps < int(words.steps):
        loss = engine.train_batch(batches)
        if engine.global_rank == 0:
            with Path(words.log).open("a") as log:
                log.write(json.dumps({"step": engine.global_steps, "loss": float(loss)}) + "\n")
    checkpointer.close()


if __name__ == "__main__":
    main()
