"""A script whose worlds, one after another and side by side, have one path and several models."""

from __future__ import annotations

import multiprocessing
import os
import sys
from functools import partial
from pathlib import Path

FOLDER = Path(sys.argv[1])


def world(name, answers, going):
    """One world; its first word comes in any case."""
    try:
        began = train_and_compare(name)
    except BaseException as error:
        answers.put((name, f"failed: {error!r}"))
        raise
    answers.put((name, began))
    if name == "killed":
        answers.close()
        answers.join_thread()
        os._exit(0)
    going.wait()


def train_and_compare(name):
    """What a test of models does: train, save, load with a second engine, compare."""
    import spotspeed

    spotspeed.install()
    import deepspeed
    import torch
    from engines import make, train

    # Not by MASTER_PORT, which the world that stays has.
    deepspeed.init_distributed("gloo", init_method=f"file://{FOLDER / f'{name}.store'}",
                               rank=0, world_size=1)  # fmt: skip
    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    make_one = partial(
        make, {"other stage": 2}.get(name, 1), FOLDER / "path", attached=False,
        extra=name == "other model", optimizer=momentum if name == "other optimizer" else None,
    )  # fmt: skip
    first = make_one()
    began = first.global_steps
    if name == "killed":
        train(first, 4)
        spotspeed.save(first)
        return began
    train(first, 2)
    first.save_checkpoint(FOLDER / name)
    second = make_one(seed=2)
    second.load_checkpoint(FOLDER / name)
    assert second.global_steps == first.global_steps
    for mine, theirs in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    if name == "destroyed":
        train(first, 1)
        first.destroy()
    return began


def main():
    context = multiprocessing.get_context("spawn")
    answers, idle, done = context.Queue(), context.Event(), context.Event()
    done.set()
    names = ["destroyed", "other model", "same model", "killed", "after it", "idle", "beside it",
             "other optimizer", "other stage"]  # fmt: skip
    processes = []
    for name in names:
        going = idle if name == "idle" else done
        process = context.Process(target=world, args=(name, answers, going), daemon=True)
        process.start()
        processes.append(process)
        print(*answers.get(timeout=200), flush=True)
        if name != "idle":
            process.join()
    idle.set()
    for process in processes:
        process.join()
    assert not any(process.exitcode for process in processes)


if __name__ == "__main__":
    main()
