"""The training that cuts.py and evidence.py interrupt: it writes down all that happens to it.

Each rank appends JSON lines with times of the monotonic clock to one log: its events, and a
checksum of the weights after every update. It asks for a save when a datagram at its own socket
says so. `--does` says what it spends its time with; a record "enters" tells when it begins to.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import spotspeed
from spotspeed import events

SAMPLES = 4
EVALUATE_EVERY = 3
DOES = ("mixed", "compute", "collective", "data", "evaluation", "compile", "first")
TRAITS = ("overflow", "handlers", "asyncio", "ignore")
LATE_S = 0.4
FIRST_BATCH_S = 8.0
must_fail = threading.Event()


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

    def enter(self, phase: str) -> None:
        """A phase that lasts begins."""
        self._log.phase = phase
        self._log.write("enters")


class SlowSamples(Dataset[torch.Tensor]):
    """Samples that take their time, the first of each worker `first_s`."""

    def __init__(self, width: int, first_s: float) -> None:
        self._width, self._first_s = width, first_s

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        time.sleep(self._first_s or 0.03)
        self._first_s = 0.0
        return torch.randn(self._width, generator=generator).bfloat16()


class Activity:
    """What a rank does in each step, beside training."""

    def __init__(self, does: str, pause: Pauses, width: int, is_late: bool) -> None:
        self._does, self._pause, self._is_late = does, pause, is_late
        self._matrix = torch.randn(384, 384)
        self._width = width

    def before_step(self) -> None:
        """In the place of a forward."""
        if self._does == "compute":
            self._pause.enter("compute")
            product = self._matrix
            for _ in range(60):
                product = torch.tanh(product @ self._matrix)
        elif self._does == "collective" and self._is_late:
            self._pause.enter("late")
            time.sleep(LATE_S)
        elif self._does == "collective":
            self._pause.enter("collective")
        elif self._does == "compile":
            self._pause.enter("compile")
            torch._dynamo.reset()
            torch.compile(_traced, backend="aot_eager")(self._matrix.clone().requires_grad_())

    def after_step(self, engine: Any, x: torch.Tensor) -> None:
        """Where a step has ended."""
        if self._does == "evaluation":
            self._pause.enter("evaluation")
            end = time.monotonic() + 0.3
            engine.eval()
            with torch.no_grad():
                while time.monotonic() < end:
                    engine(x)
            engine.train()
        elif self._does in ("data", "first"):
            self._pause.enter("data")


def _traced(x: torch.Tensor) -> torch.Tensor:
    for _ in range(30):
        x = torch.sin(x) * torch.tanh(x)
    return x


class Model(nn.Module):
    def __init__(self, width: int, layers: int, pause: Pauses | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.pause = pause

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pause is not None:
            self.pause("forward" if self.training else "evaluation")
        for layer in self.layers:
            x = torch.tanh(layer(x))
        if x.requires_grad and self.pause is not None:
            x.register_hook(lambda gradient: self.pause("backward"))
        return x.float().pow(2).mean()


def listen(log: Log, name: str, checkpointer: Any) -> None:
    """Body of the thread that asks for saves, and tells the main thread to fail."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as orders:
        orders.bind("\0" + name)
        log.write("listening", pid=os.getpid())
        while True:
            if orders.recv(16) == b"fail":
                must_fail.set()
                continue
            log.write("asked")
            checkpointer.request_save()


def checksum(engine: Any) -> int:
    """CRC-32 of all weights, in the order of their names."""
    total = 0
    for _, weight in sorted(engine.module.named_parameters()):
        data = weight.detach().contiguous().view(torch.uint8).numpy()
        total = zlib.crc32(data, total)
    return total


def batches(engine: Any, checkpointer: Any, arguments: Any) -> Iterator[torch.Tensor]:
    """What this rank learns from: the same in every launch."""
    if checkpointer.loader is not None:
        yield from checkpointer.batches(epochs=None)
        return
    rank, micro = torch.distributed.get_rank(), 0
    while True:
        generator = torch.Generator().manual_seed(engine.global_steps * 64 + rank + micro * 4096)
        micro = (micro + 1) % engine.gradient_accumulation_steps()
        yield torch.randn(SAMPLES, arguments.width, generator=generator).bfloat16()


def take_signals(log: Log, when: str) -> None:
    """A handler of the user's own, which only writes down that it was called."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        before = signal.getsignal(number)

        def handler(number: int, frame: Any, before: Any = before) -> None:
            log.write("handler", number=number, when=when)
            if callable(before):
                before(number, frame)

        signal.signal(number, handler)


def arguments_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("--config", required=True)
    parser.add_argument("--log", required=True)
    parser.add_argument("--orders", required=True, help='socket, without "-<rank>"')
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=10**9, help="updates in this launch")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pause-ms", type=float, default=10)
    parser.add_argument("--does", choices=DOES, default="mixed")
    parser.add_argument("--late", type=int, default=-1, help="rank that the others wait for")
    parser.add_argument("--trait", choices=TRAITS, default=None)
    parser.add_argument(
        "--fails", choices=("raise", "exit", "midway", "return"), help="how, where it is told to"
    )
    parser.add_argument("--linger", type=float, default=0.0, help="seconds between loop and end")
    parser.add_argument("--local_rank", type=int, help="of the deepspeed launcher; not used")
    return parser.parse_args()


def train(engine: Any, checkpointer: Any, tools: tuple[Log, Pauses], arguments: Any) -> None:
    log, pause = tools
    rank = torch.distributed.get_rank()
    activity = Activity(arguments.does, pause, arguments.width, rank == arguments.late)
    last = engine.global_steps + arguments.steps
    is_mixed = arguments.does == "mixed"
    dtype = next(engine.module.parameters()).dtype
    if not is_mixed:
        pause.enter("first" if arguments.does == "first" else "start")
    for x in batches(engine, checkpointer, arguments):
        x = x.to(dtype)
        if is_mixed:
            pause("data")
        activity.before_step()
        engine.backward(engine(x))
        before = engine.global_steps
        engine.step()
        if engine.global_steps == before:
            continue
        log.write("step", step=engine.global_steps, checksum=checksum(engine))
        if must_fail.is_set():
            log.write("failing")
            if arguments.fails == "exit":
                sys.exit(75)
            if arguments.fails == "midway":
                engine(x)
                raise SystemExit(75)
            if arguments.fails == "return":
                return
            raise RuntimeError("a mistake of the training script")
        if arguments.trait == "asyncio":
            asyncio.run(asyncio.sleep(0))
        if is_mixed and engine.global_steps % EVALUATE_EVERY == 0:
            engine.eval()
            with torch.no_grad():
                engine(x)
            engine.train()
        activity.after_step(engine, x)
        if engine.global_steps >= last:
            return


def main() -> None:
    os.environ["TORCHDYNAMO_DISABLE"] = "0"  # It compiles, whatever the tests around it save.
    arguments = arguments_of(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    deepspeed.init_distributed("gloo", distributed_port=int(os.environ["MASTER_PORT"]))
    rank = torch.distributed.get_rank()
    log = Log(arguments.log, rank)
    events.add_sink(log)
    log.write("begun", pid=os.getpid())
    pause = Pauses(log, arguments.seed * 64 + rank, arguments.pause_ms / 1000)
    if arguments.trait == "overflow":
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    if arguments.trait == "handlers":
        take_signals(log, "before")
    torch.manual_seed(1)
    is_mixed = arguments.does == "mixed"
    model = Model(arguments.width, arguments.layers, pause if is_mixed else None)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=arguments.config
    )
    loader = None
    if arguments.does in ("data", "first"):
        first_s = FIRST_BATCH_S if arguments.does == "first" else 0.0
        loader = DataLoader(SlowSamples(arguments.width, first_s), batch_size=SAMPLES, shuffle=True,
                            num_workers=1)  # fmt: skip
    checkpointer = spotspeed.attach(engine, loader=loader)
    if arguments.trait == "handlers":
        take_signals(log, "after")
    restored = checkpointer.restore()
    log.write("restored", step=restored.step if restored else 0, checksum=checksum(engine))
    threading.Thread(
        target=listen, args=(log, f"{arguments.orders}-{rank}", checkpointer), daemon=True
    ).start()
    if is_mixed:
        engine.optimizer.optimizer.register_step_pre_hook(lambda *_: pause("update"))
    if arguments.trait == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    train(engine, checkpointer, (log, pause), arguments)
    pause.enter("end")
    time.sleep(arguments.linger)


if __name__ == "__main__":
    main()
