"""The ranks of restore.py: write one state both ways, or load it again and again."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import distributed, nn

import spotspeed
from spotspeed.checkpoint.restore import Seat, restore_agreed
from spotspeed.state import huge_pages
from spotspeed.storage.intercept import InterceptedStorage
from spotspeed.storage.trace import Tally, Tracer

STEPS = 2


def make_engine(options: argparse.Namespace, *, with_block: bool) -> Any:
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(options.width, options.width) for _ in range(options.layers)))
    block = {"spotspeed": {"path": str(Path(options.folder) / "spotspeed"),
                           "interval": {"seconds": None}}}  # fmt: skip
    config = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "steps_per_print": 10**9,
        "zero_optimization": {"stage": options.stage},
        "checkpoint": {"load_universal": options.universal},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        **(block if with_block else {}),
    }  # fmt: skip
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def step(engine: Any, width: int) -> None:
    engine.backward(engine(torch.ones(1, width).bfloat16()).float().pow(2).mean())
    engine.step()


def timed(call: Callable[[], Any]) -> float:
    """Seconds of `call`, begun by all ranks together, until the slowest has ended."""
    distributed.barrier()
    began = time.perf_counter()
    call()
    distributed.barrier()
    return time.perf_counter() - began


def bytes_asked() -> int:
    """Bytes that this process has asked the kernel to read, from cache or disk."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise ValueError("/proc/self/io has no rchar")


def write(options: argparse.Namespace, engine: Any) -> dict[str, Any]:
    checkpointer = spotspeed.attach(engine)
    for _ in range(STEPS):
        step(engine, options.width)
    type(engine).save_checkpoint.__wrapped__(
        engine, str(Path(options.folder) / "deepspeed"), tag="all"
    )
    checkpointer.save("all").wait(300)
    checkpointer.close()
    return {}


def have_memory(engine: Any) -> None:
    """Touch as much as a restore will, and give it back: for a second or two the machine has it."""
    elements = sum(parameter.numel() for parameter in engine.module.parameters())
    touched = torch.empty(5 * elements // distributed.get_world_size())  # State, weights, staging.
    huge_pages.ask(touched)
    touched.fill_(1)
    distributed.barrier()
    del touched


def load(options: argparse.Namespace, engine: Any) -> dict[str, Any]:
    """Ours from the launch on, then both in turn."""
    made: list[Any] = []
    have_memory(engine)
    import_s = timed(lambda: spotspeed.attach)  # What it needs is imported with the name.
    attach_s = timed(lambda: made.append(spotspeed.attach(engine)))
    checkpointer = made[0]
    seat = Seat(checkpointer.rank, checkpointer.world_size,
                checkpointer._session.coordinator.exchange, checkpointer._provider,
                checkpointer._small)  # fmt: skip
    have_memory(engine)
    first_s = timed(lambda: restore_agreed(checkpointer._session.storage, seat))
    tally = Tally()
    traced = InterceptedStorage(checkpointer._session.storage, Tracer(tally.add))
    asked = bytes_asked()
    restore_agreed(traced, seat)
    asked = bytes_asked() - asked
    # What several ranks of this one node have is needed once.
    needed = sum(piece.share.fragment.size_bytes for piece in checkpointer._provider.pieces())
    original_load = type(engine).load_checkpoint.__wrapped__
    ours, theirs = [], []
    for number in range(options.rounds):
        calls = [
            lambda: ours.append(timed(lambda: restore_agreed(checkpointer._session.storage, seat)))
        ]
        if options.beside:
            calls.append(lambda: theirs.append(timed(lambda: original_load(
                engine, str(Path(options.folder) / "deepspeed"), tag="all"
            ))))  # fmt: skip
        for call in calls if number % 2 else calls[::-1]:
            call()
    answers: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(answers, {
        "needed": needed, "asked": asked, "read": tally.bytes_read,
    })  # fmt: skip
    checkpointer._detach()  # without the save that close() makes
    return {"import_s": import_s, "attach_s": attach_s, "first_s": first_s, "ours_s": ours,
            "theirs_s": theirs, "bytes": answers}  # fmt: skip


def load_universal(options: argparse.Namespace, engine: Any) -> dict[str, Any]:
    folder = str(Path(options.folder) / "universal")
    took = [timed(lambda: engine.load_checkpoint(folder, tag="all")) for _ in range(options.rounds)]
    return {"theirs_s": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=("write", "load", "load-universal"))
    parser.add_argument("--folder", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--beside", action="store_true", help="DeepSpeed's own load in turn")
    options = parser.parse_args()
    options.universal = options.mode == "load-universal"
    deepspeed.init_distributed("gloo", distributed_port=int(os.environ["MASTER_PORT"]))
    engine = make_engine(options, with_block=not options.universal)
    modes = {"write": write, "load": load, "load-universal": load_universal}
    found = modes[options.mode](options, engine)
    if distributed.get_rank() == 0:
        Path(options.out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
