"""A training that gets a notice at an awkward moment: python notices.py CASE FOLDER [BLOCK].

Every rank writes the events of its launch, one a line, to FOLDER/events-RANK. BLOCK is JSON that
joins the spotspeed block.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import deepspeed
import torch

import spotspeed
from spotspeed import events
from spotspeed.checkpoint.session import Session

CASE, FOLDER = sys.argv[1], Path(sys.argv[2])
BLOCK = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
RANK = int(os.environ["RANK"])
TIMEOUT_S = 120

stop_agreed = threading.Event()
log = (FOLDER / f"events-{RANK}").open("a", buffering=1)


def sink(event: events.Event) -> None:
    log.write(json.dumps({"event": type(event).__name__, **asdict(event)}) + "\n")
    if isinstance(event, events.Agreed) and event.stop:
        stop_agreed.set()


def notice() -> None:
    """This rank's machine goes away."""
    os.kill(os.getpid(), signal.SIGUSR1)


def build():
    torch.manual_seed(1)
    width = 256
    model = torch.nn.Sequential(
        torch.nn.Linear(16, width), torch.nn.Linear(width, width), torch.nn.Linear(width, 1)
    )
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 2, "steps_per_print": 10**9,
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "spotspeed": {
                "path": str(FOLDER / "checkpoints"), "interval": {"seconds": None}, **BLOCK,
            },
        },
    )  # fmt: skip
    return engine


def train(engine, last: int) -> None:
    while engine.global_steps < last:
        x = torch.full((2, 16), 0.1 * (engine.global_steps + RANK))
        engine.backward(engine(x).pow(2).mean())
        engine.step()


def plain(engine, checkpointer) -> None:
    """Nothing happens."""
    train(engine, 4)


def told(engine, checkpointer) -> None:
    """One save is measured; the notice comes to rank 1 a few steps later."""
    train(engine, 3)
    checkpointer.save("good").wait(TIMEOUT_S)
    (FOLDER / f"saved-{RANK}").touch()
    train(engine, 5)
    if RANK == 1 and "file" not in BLOCK.get("notice", {}):
        notice()
    train(engine, 10**9)


def saver_dies(engine, checkpointer) -> None:
    """The saver is held when the notice comes, and killed before it can store what it got."""
    train(engine, 3)
    checkpointer.save("good").wait(TIMEOUT_S)
    saver = checkpointer._session.stager._session.saver_pid
    checkpointer._session.coordinator.exchange("saved", b"")
    train(engine, 5)
    if RANK == 1:
        os.kill(saver, signal.SIGSTOP)
        notice()
        assert stop_agreed.wait(TIMEOUT_S)
        os.kill(saver, signal.SIGKILL)
    train(engine, 10**9)


def notice_while_restoring() -> None:
    """Rank 1 hears of the end of its machine when it begins to fill its engine."""
    inner = Session.seat

    def interrupt() -> None:
        notice()
        assert stop_agreed.wait(TIMEOUT_S)

    def seat(self, *args):
        return replace(inner(self, *args), on_change=interrupt)

    if RANK == 1:
        Session.seat = seat


def main() -> None:
    deepspeed.init_distributed("gloo", distributed_port=int(os.environ["MASTER_PORT"]))
    events.add_sink(sink)
    engine = build()
    checkpointer = spotspeed.attach(engine)
    if CASE == "restoring":
        notice_while_restoring()
    restored = checkpointer.restore()
    (FOLDER / f"restored-{RANK}").write_text(json.dumps(restored and restored.step))
    {"restoring": plain}.get(CASE, globals().get(CASE))(engine, checkpointer)


if __name__ == "__main__":
    main()
