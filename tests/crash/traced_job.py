"""A small job whose every system call is recorded: two ranks, the real saver, a removal, the end.

`traced_job.py PATH` leaves marks (testing/syscalls.py) where something has been promised.
"""

from __future__ import annotations

import os
import sys

import torch

from spotspeed.checkpoint.gc import collect
from spotspeed.checkpoint.ownership import claim_epoch, record_restored_from, release
from spotspeed.config import parse_block
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket
from spotspeed.core.retention import Keep
from spotspeed.staging.stager import Stager
from spotspeed.storage import open_storage
from spotspeed.testing.syscalls import MARK

RANKS = 2
ELEMENTS, FROZEN_ELEMENTS = 3000, 10_000


def say(word: str) -> None:
    os.access(MARK + word, os.F_OK)


def part(kind: str, rank: int, value: float, total: int) -> tuple[Fragment, torch.Tensor]:
    """A rank's share of one tensor of `total` elements, each of them `value`."""
    interval = Interval(0, total).split(RANKS, rank)
    fragment = Fragment(TensorKey(kind, "layer.weight"), "float32", (total,), interval)
    return fragment, torch.full((interval.count,), value, dtype=torch.float32)


def main(path: str) -> None:
    storage = open_storage(path)
    epoch = claim_epoch(storage).epoch
    record_restored_from(storage, epoch, None)
    config = parse_block({"path": path})
    stagers = [Stager(path, config, rank, local_world_size=RANKS) for rank in range(RANKS)]
    for step in (10, 20, 30):
        ticket = Ticket(epoch, step, "p", f"step-{step}", "periodic", RANKS, 1_700_000_000)
        saves = [
            stager.stage(
                ticket, [part("fp32", rank, step, ELEMENTS)],
                {TensorKey("blob", "rank", f"rank-{rank}"): b"state"},
                frozen=[part("weight", rank, 7 + (step > 10), FROZEN_ELEMENTS)],
            )
            for rank, stager in enumerate(stagers)
        ]  # fmt: skip
        for save in saves:
            save.upload_completion.result(60)
        say(f"sealed {ticket.directory}")
    say(f"kept {ticket.directory}")
    done = collect(storage, Keep(1), epoch=epoch)
    assert len(done.frozen) == RANKS, "the frozen weights of step 10 were edited"
    for stager in stagers:
        stager.close()
    release(storage, epoch)


if __name__ == "__main__":
    main(sys.argv[1])
