"""Drop-in saves by one process and loads by another: `save`, `exit`, `daemon` or `load`."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

from engines import make, train

MODE, FOLDER = sys.argv[1], Path(sys.argv[2])


def save(steps, path=FOLDER / "catalogue"):
    engine = make(2, path)
    train(engine, steps)
    engine.save_checkpoint(FOLDER / "out", client_state={"steps": steps})
    return engine


def child():
    save(3)
    os._exit(7)


if __name__ == "__main__":
    if MODE == "save":
        save(2).destroy()
    elif MODE == "exit":
        save(2)
        os._exit(0)
    elif MODE == "daemon":
        process = multiprocessing.get_context("spawn").Process(target=child, daemon=True)
        process.start()
        process.join()
        assert process.exitcode == 7, process.exitcode
        print("saved by a daemon")
    else:
        engine = make(3, FOLDER / "catalogue", seed=5)
        _, client_state = engine.load_checkpoint(FOLDER / "out")
        assert client_state == {"steps": engine.global_steps}
        print(f"loaded step {engine.global_steps}")
        train(engine, 1)
        engine.destroy()
