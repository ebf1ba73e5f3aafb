"""Train a small byte-level GPT on the sources of Python's standard library.

    deepspeed --num_gpus 2 examples/train_gpt.py --config examples/ds_config.json
    mpirun -n 2 python examples/train_gpt.py --config examples/ds_config.json

An ordinary DeepSpeed script: which samples a step sees follows from `engine.global_samples` alone,
so it goes on where the engine is, whatever the number of ranks. Three lines are spotspeed's.
"""

import argparse
import json
import os
import pathlib
import sysconfig
import time
from collections.abc import Iterator

import deepspeed
import torch
from torch import distributed, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler

import spotspeed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="DeepSpeed config JSON")
    parser.add_argument("--steps", type=int, default=120, help="optimizer updates in all")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=128, help="bytes of text a sample holds")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=0, help="DataLoader workers a rank")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--log", help="append one JSON line a step to this file")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser.parse_args()


class Text(Dataset):
    """Windows of `context` + 1 bytes of every module of the standard library."""

    def __init__(self, context: int) -> None:
        folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
        text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.context

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.context
        return self.bytes[start : start + self.context + 1].long()


class GlobalOrder(Sampler):
    """This rank's micro-batches of one endless shuffled stream, from sample `position` on."""

    def __init__(self, size: int, micro: int, position: int, seed: int) -> None:
        self.size, self.micro, self.position, self.seed = size, micro, position, seed
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order, position = -1, [], self.position + self.rank * self.micro
        while True:
            batch = []
            for sample in range(position, position + self.micro):
                if sample // self.size != epoch:
                    epoch = sample // self.size
                    generator = torch.Generator().manual_seed(self.seed + epoch)
                    order = torch.randperm(self.size, generator=generator).tolist()
                batch.append(order[sample % self.size])
            yield batch
            position += self.world * self.micro


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )
        self.heads, self.dropout = width // 32, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True
        )
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Predicts the next byte; input and output embeddings are tied."""

    def __init__(self, width: int, layers: int, context: int, dropout: float) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for table in (self.token, self.place):
            nn.init.normal_(table.weight, std=0.02)
        self.head.weight = self.token.weight

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        given, wanted = text[:, :-1], text[:, 1:]
        x = self.token(given) + self.place(torch.arange(given.shape[1], device=given.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def main() -> None:
    arguments = parse_arguments()
    deepspeed.init_distributed(distributed_port=int(os.environ.get("MASTER_PORT", "29500")))
    torch.manual_seed(arguments.seed)
    model = GPT(arguments.width, arguments.layers, arguments.context, arguments.dropout)
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=arguments.config
    )
    checkpointer = spotspeed.attach(engine)
    checkpointer.restore()

    text = Text(arguments.context)
    order = GlobalOrder(
        len(text), engine.train_micro_batch_size_per_gpu(), engine.global_samples, arguments.seed
    )
    loader = DataLoader(text, batch_sampler=order, num_workers=arguments.workers)
    losses: list[torch.Tensor] = []
    for batch in loader:
        if engine.global_steps >= arguments.steps:
            break
        loss = engine(batch.to(engine.device))
        engine.backward(loss)
        losses.append(loss.detach())
        updates = engine.global_steps
        engine.step()
        if engine.global_steps > updates:
            report(engine.global_steps, torch.stack(losses).mean(), arguments.log)
            losses.clear()


def report(step: int, loss: torch.Tensor, log: str | None) -> None:
    """Average the loss over the ranks; rank 0 prints and logs it."""
    distributed.all_reduce(loss)
    ranks = distributed.get_world_size()
    if distributed.get_rank() == 0:
        record = {"step": step, "loss": loss.item() / ranks, "ranks": ranks, "unix_s": time.time()}
        print(f"step {step:4d}  loss {record['loss']:.4f}  on {ranks} ranks", flush=True)
        if log:
            with open(log, "a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
