"""Rank of a job in which one rank is killed: the others are to save one step and to leave.

The survivors are stuck in a gloo all-reduce with the dead rank, or get an error from it. Each
survivor prints one JSON line when the listener is told to leave.

    cut_loss.py VICTIM LAST_STEP native|python
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from spotspeed import events
from spotspeed.config import parse_block
from spotspeed.coordinator.bootstrap import bootstrap
from spotspeed.coordinator.coordinator import Coordinator, Cut, GateVerdict

STUCK_S = 60.0


class Saver:
    """Saves in no time, as if replicas covered what the dead rank held."""

    def __init__(self) -> None:
        self.coordinator: Coordinator
        self.told: dict[str, object] = {"lost": [], "cut": None, "digest": None}

    def on_notice(self, source: str, seconds_left: float) -> None: ...

    def on_agreed(self, cut: Cut) -> None: ...

    def on_capture(self, cut: Cut) -> None:
        self.coordinator.report_staged(cut.round)
        self.coordinator.report_durable(cut.round, f"{cut.attempt}@{cut.step}")

    def on_outcome(self, cut: Cut, digest: str | None, why: str) -> None:
        self.told |= {"cut": cut.step, "digest": digest, "cut_lost": cut.lost}

    def on_peer_lost(self, rank: int, why: str) -> None:
        self.told["lost"].append(rank)  # type: ignore[attr-defined]

    def leave(self, why: str) -> None:
        sys.stdout.write(json.dumps(self.told) + "\n")
        sys.stdout.flush()
        os._exit(0)


def main() -> None:
    victim, last, is_native = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "native"
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    events.remove_sink(events.log_sink)
    saver = Saver()
    block = {"path": "/unused", "notice": {"signals": []}}
    transport = bootstrap(rank=rank, world_size=size, is_native=is_native)
    saver.coordinator = Coordinator(transport, parse_block(block), saver)
    saver.coordinator.start(0)
    for step in range(1, 1000):
        assert saver.coordinator.gate(step) is GateVerdict.GO
        saver.coordinator.completed(step)
        if rank == victim and step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError:
            time.sleep(STUCK_S)


if __name__ == "__main__":
    main()
