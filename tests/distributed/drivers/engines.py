"""A small real engine for drivers: any stage, with or without a block, losses that tell steps."""

from __future__ import annotations

import os

import deepspeed
import torch

import spotspeed

RANK = int(os.environ["RANK"])
WORLD_SIZE = int(os.environ["WORLD_SIZE"])


class Net(torch.nn.Module):
    def __init__(self, width=16, extra=False):
        super().__init__()
        self.frozen = torch.nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.body = torch.nn.Sequential(
            torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, 4)
        )
        self.extra = torch.nn.Linear(4, 4) if extra else None

    def forward(self, x):
        y = self.body(self.frozen(x))
        return y if self.extra is None else self.extra(y)


def make(stage=0, path=None, *, attached=True, optimizer=None, scheduler=None, seed=1, **changes):
    """A new engine; with `path` it has a block, and is attached unless told otherwise."""
    torch.manual_seed(seed)
    model = Net(extra=changes.pop("extra", False))
    config = {
        "train_batch_size": 6, "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20}}, **changes,
    }  # fmt: skip
    if scheduler is not None:
        del config["scheduler"]
    if optimizer is None:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    if path is not None:
        config["spotspeed"] = {"path": str(path), "interval": {"seconds": None}}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = deepspeed.initialize(
        model=model, model_parameters=trained, config=config, lr_scheduler=scheduler,
        optimizer=None if optimizer is None else optimizer(trained),
    )[0]  # fmt: skip
    if path is not None and attached:
        spotspeed.attach(engine)
    return engine


def micro_step(engine):
    generator = torch.Generator().manual_seed(1000 * engine.global_steps + engine.micro_steps)
    x = torch.rand(1, 8, generator=generator) * (RANK + 1)
    dtype = next(engine.module.parameters()).dtype
    loss = engine(x.to(dtype)).float().pow(2).mean()
    engine.backward(loss)
    engine.step()
    return loss.detach().item()


def train(engine, steps):
    """So many optimizer steps; the loss of the first micro-batch of each."""
    losses = []
    for _ in range(steps):
        # A load sets the count of micro-steps to 0, so draw the same data before and after it.
        engine.micro_steps = 0
        losses.append(micro_step(engine))
        for _ in range(engine.gradient_accumulation_steps() - 1):
            micro_step(engine)
    return losses


def raises(kind, action):
    """The error of `action`, which must be of `kind` itself or below it."""
    try:
        action()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def main(checks, *arguments):
    """Run the named checks of a driver, each in a folder of its own below the first argument."""
    for check in checks:
        check(*arguments)
        print(f"rank {RANK}: {check.__name__}: held", flush=True)
