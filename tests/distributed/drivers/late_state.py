"""Trains with state of the script's own: `late_state.py FOLDER train|notice|said|restore`.

train    four steps, saved at its close
notice   saves step 2, then is told to stop while the loop has not ended step 3
said     the same, but the loop has said that step 3 has ended
restore  restores the engine alone, then all; prints what each rank has then
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from engines import RANK, make, train

import spotspeed

FOLDER, MODE = Path(sys.argv[1]), sys.argv[2]


class Loop:
    """Counts, on each rank by its own measure, after `engine.step()`."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count, "rank": RANK}

    def load_state_dict(self, state):
        self.count, self.rank = state["count"], state["rank"]


class Data(Loop):
    """Hands out the batch of the next step before that step's forward."""

    def __iter__(self):
        while True:
            self.count += 1
            yield self.count


def attached(state):
    engine = make(2, FOLDER, attached=False)
    return engine, spotspeed.attach(engine, state=state)


def steps(engine, loop, data, number):
    for _ in range(number):
        batch = next(data)
        train(engine, 1)
        assert batch == engine.global_steps
        loop.count += 1 + RANK


def restore():
    engine, checkpointer = attached(None)
    print(f"rank {RANK}: engine alone: step {checkpointer.restore().step}")
    checkpointer.close()
    engine.destroy()
    loop, data = Loop(), Data()
    engine, checkpointer = attached({"loop": loop, "data": data})
    step = checkpointer.restore().step
    print(f"rank {RANK}: all: step {step}, loop {loop.count} of rank {loop.rank}, "
          f"data {data.count}")  # fmt: skip
    steps(engine, loop, iter(data), 1)
    checkpointer.close()
    engine.destroy()


def main():
    loop, data = Loop(), Data()
    engine, checkpointer = attached({"loop": loop, "data": data})
    steps(engine, loop, iter(data), 2)
    if MODE == "train":
        steps(engine, loop, iter(data), 2)
        checkpointer.close()
        engine.destroy()
        return
    checkpointer.save().wait(120)
    steps(engine, loop, iter(data), 1)
    if MODE == "said":
        checkpointer.end_step()
    if RANK == 0:
        os.kill(os.getpid(), signal.SIGUSR1)
    threading.Event().wait(200)  # Something long of the script's, in which the job is ended.


if __name__ == "__main__":
    (restore if MODE == "restore" else main)()
