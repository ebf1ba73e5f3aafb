"""A training that is interrupted at a chosen place: python stops.py CASE FOLDER.

Ranks send themselves real signals. Where a case depends on who is where when the ranks agree, they
wait until they hear that they have.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import deepspeed
import torch

import spotspeed
from spotspeed import events

CASE, FOLDER = sys.argv[1], Path(sys.argv[2])
RANK = int(os.environ["RANK"])
STOP_STEP = 5
STAGE = 0 if CASE in ("covered", "resumed") else 1
PAUSE_S = 2
GENERATES_S = 1.5
AGREED_TIMEOUT_S = 60

any_agreed, stop_agreed = threading.Event(), threading.Event()


def sink(event: events.Event) -> None:
    if isinstance(event, events.Agreed):
        any_agreed.set()
        if event.stop:
            stop_agreed.set()


def notice(name: str = "SIGUSR1") -> None:
    """This rank's machine goes away."""
    os.kill(os.getpid(), getattr(signal, name))


def await_agreement() -> None:
    assert stop_agreed.wait(AGREED_TIMEOUT_S), "no agreement"


def pause() -> None:
    """Stop this whole process for a while, shorter than the others' patience."""
    with subprocess.Popen(["sh", "-c", f"sleep {PAUSE_S}; kill -CONT {os.getpid()}"]):
        os.kill(os.getpid(), signal.SIGSTOP)


def capture_at_gate(checkpointer) -> None:
    """The next time that this rank comes to its gate, a save is agreed on before it looks."""
    coordinator = checkpointer._session.coordinator
    enter = coordinator.gate

    def gate(step: int):
        coordinator.gate = enter
        checkpointer.request_save()
        assert any_agreed.wait(AGREED_TIMEOUT_S), "no agreement"
        return enter(step)

    coordinator.gate = gate


def build():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 2, "steps_per_print": 10**9,
            "bf16": {"enabled": True}, "zero_optimization": {"stage": STAGE},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "spotspeed": {
                "path": str(FOLDER / "checkpoints"),
                "interval": {"steps": STOP_STEP if CASE == "grid" else None, "seconds": None},
            },
        },
    )  # fmt: skip
    return engine


def train(engine, last: int) -> None:
    while engine.global_steps < last:
        x = torch.full((2, 16), 0.1 * (engine.global_steps + RANK)).bfloat16()
        engine.backward(engine(x).float().pow(2).mean())
        engine.step()


def grid(engine, checkpointer) -> None:
    """Several wishes at once, a pause, and two notices at a step that is saved anyway."""
    train(engine, 1)
    capture_at_gate(checkpointer)
    train(engine, 2)
    if RANK != 1:
        checkpointer.request_save()
        checkpointer.request_save()
    train(engine, 3)
    if RANK == 1:
        pause()
    train(engine, STOP_STEP)
    if RANK != 1:
        notice("SIGUSR1" if RANK == 0 else "SIGTERM")
    await_agreement()
    train(engine, STOP_STEP + 3)


def closing(engine, checkpointer) -> None:
    """Rank 1 hears of the end of its machine while rank 0 is closing already."""
    train(engine, 3)
    if RANK == 1:
        notice()
        await_agreement()
    checkpointer.close()


def ending(engine, checkpointer) -> None:
    """The same, where nobody calls close()."""
    train(engine, 3)
    if RANK == 1:
        notice()
        await_agreement()


def killed(engine, checkpointer) -> None:
    train(engine, 3)
    checkpointer.save("good").wait(60)
    train(engine, 5)
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    train(engine, 100)


def covered(engine, checkpointer) -> None:
    """Rank 1 dies, and the others hold all that it held."""
    train(engine, 5)
    if RANK == 0:
        masters = [flat.detach().float().flatten() for flat in engine.optimizer.fp32_groups[0]]
        torch.save(torch.cat(masters), FOLDER / "masters.pt")
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    train(engine, 100)


def resumed(engine, checkpointer) -> None:
    """What they saved is trained on from."""
    train(engine, engine.global_steps + 1)


def hanging(engine, checkpointer) -> None:
    """As NCCL has it: the collective of the others does not end when a rank dies."""
    try:
        killed(engine, checkpointer)
    except RuntimeError:
        time.sleep(1000)


def failing(engine, checkpointer) -> None:
    train(engine, 3)
    checkpointer.save("good").wait(60)
    train(engine, 5)
    if RANK == 1:
        raise ValueError("a mistake of the training script")
    train(engine, 100)


def exiting(engine, checkpointer) -> None:
    train(engine, 3)
    if RANK == 1:
        say_end()
        sys.exit(75)
    train(engine, 100)


def raising(engine, checkpointer) -> None:
    """In the middle of a step, in a way that no hook is told of."""
    train(engine, 3)
    if RANK == 1:
        engine(torch.ones(2, 16).bfloat16())
        say_end()
        raise SystemExit(75)
    train(engine, 100)


def returning(engine, checkpointer) -> None:
    train(engine, 3)
    if RANK == 1:
        say_end()
        return
    train(engine, 100)


def generating(engine, checkpointer) -> None:
    """Rank 0 alone uses what was trained for longer, and has not told the model so."""
    train(engine, 3)
    end = time.monotonic() + GENERATES_S * (RANK == 0)
    while time.monotonic() < end:
        engine(torch.ones(2, 16).bfloat16())


def handled(engine, checkpointer) -> None:
    """The script's own handler of the notice ends the main thread, in the middle of an update."""
    train(engine, 3)
    if RANK == 1:
        step = engine.optimizer.step

        def interrupted(*args, **kwargs):
            say_end()
            notice("SIGTERM")
            return step(*args, **kwargs)

        engine.optimizer.step = interrupted
    train(engine, 100)


def finally_closing(engine, checkpointer) -> None:
    """The script closes in any case, and only rank 1 has an error."""
    try:
        train(engine, 3)
        if RANK == 1:
            engine(torch.ones(2, 16).bfloat16())
            say_end()
            raise KeyError("a mistake of the training script")
        train(engine, 100)
    finally:
        checkpointer.close()


def say_end() -> None:
    (FOLDER / "ended").write_text(str(time.time()))


def main() -> None:
    if CASE == "handled":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    deepspeed.init_distributed("gloo", distributed_port=int(os.environ["MASTER_PORT"]))
    events.add_sink(sink)
    engine = build()
    checkpointer = spotspeed.attach(engine)
    if CASE == "starting" and RANK == 1:
        notice()
        await_agreement()
    restored = checkpointer.restore()
    (FOLDER / f"restored-{RANK}.json").write_text(json.dumps(restored and restored.step))
    if CASE != "starting":
        globals()[CASE](engine, checkpointer)


if __name__ == "__main__":
    main()
