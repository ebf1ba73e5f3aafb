"""The training that cuts.py interrupts: it pauses at random in every phase, and writes all down.

Each rank appends JSON lines with times of the monotonic clock to one log: its events, and a
checksum of the weights after every update. It asks for a save when a datagram at its own socket
says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import socket
import threading
import time
import zlib
from typing import Any

import deepspeed
import torch
from torch import nn

import spotspeed
from spotspeed import events

SAMPLES = 4
EVALUATE_EVERY = 3


class Log:
    """Appends records to a file that all ranks share; a line is one write, and so stays whole."""

    def __init__(self, path: str, rank: int) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._rank = rank
        self.phase = "start"

    def __call__(self, event: events.Event) -> None:
        """The sink of all events."""
        self.write(type(event).__name__.lower(), **dataclasses.asdict(event))

    def write(self, what: str, /, **facts: Any) -> None:
        record = {"kind": what, "at": time.monotonic(), "rank": self._rank, "phase": self.phase,
                  **facts}  # fmt: skip
        os.write(self._file, json.dumps(record).encode() + b"\n")


class Pauses:
    """Names the phase that this rank is in, and stays there for a random time."""

    def __init__(self, log: Log, seed: int, longest_s: float) -> None:
        self._log, self._longest_s, self._random = log, longest_s, random.Random(seed)

    def __call__(self, phase: str) -> None:
        self._log.phase = phase
        time.sleep(self._random.uniform(0, self._longest_s))


class Model(nn.Module):
    def __init__(self, width: int, layers: int, pause: Pauses) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.pause = pause

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.pause("forward" if self.training else "evaluation")
        for layer in self.layers:
            x = torch.tanh(layer(x))
        if x.requires_grad:
            x.register_hook(lambda gradient: self.pause("backward"))
        return x.float().pow(2).mean()


def listen(log: Log, name: str, checkpointer: Any) -> None:
    """Body of the thread that asks for saves."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as orders:
        orders.bind("\0" + name)
        log.write("listening", pid=os.getpid())
        while True:
            orders.recv(16)
            log.write("asked")
            checkpointer.request_save()


def checksum(engine: Any) -> int:
    """CRC-32 of all weights, in the order of their names."""
    total = 0
    for _, weight in sorted(engine.module.named_parameters()):
        data = weight.detach().contiguous().view(torch.uint8).numpy()
        total = zlib.crc32(data, total)
    return total


def batch(step: int, rank: int, width: int) -> torch.Tensor:
    """What a rank learns from in update `step`: the same in every launch."""
    generator = torch.Generator().manual_seed(step * 64 + rank)
    return torch.randn(SAMPLES, width, generator=generator).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--log", required=True)
    parser.add_argument("--orders", required=True, help='socket, without "-<rank>"')
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=10**9, help="updates in this launch")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pause-ms", type=float, default=10)
    arguments = parser.parse_args()

    deepspeed.init_distributed("gloo", distributed_port=int(os.environ["MASTER_PORT"]))
    rank = torch.distributed.get_rank()
    log = Log(arguments.log, rank)
    events.add_sink(log)
    log.write("begun", pid=os.getpid())
    pause = Pauses(log, arguments.seed * 64 + rank, arguments.pause_ms / 1000)
    torch.manual_seed(1)
    model = Model(arguments.width, arguments.layers, pause)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=arguments.config
    )
    checkpointer = spotspeed.attach(engine)
    restored = checkpointer.restore()
    log.write("restored", step=restored.step if restored else 0, checksum=checksum(engine))
    threading.Thread(
        target=listen, args=(log, f"{arguments.orders}-{rank}", checkpointer), daemon=True
    ).start()
    engine.optimizer.optimizer.register_step_pre_hook(lambda *_: pause("update"))

    last = engine.global_steps + arguments.steps
    while engine.global_steps < last:
        pause("data")
        x = batch(engine.global_steps + 1, rank, arguments.width)
        engine.backward(engine(x))
        engine.step()
        log.write("step", step=engine.global_steps, checksum=checksum(engine))
        if engine.global_steps % EVALUATE_EVERY == 0:
            engine.eval()
            with torch.no_grad():
                engine(x)
            engine.train()
    log.phase = "end"


if __name__ == "__main__":
    main()
