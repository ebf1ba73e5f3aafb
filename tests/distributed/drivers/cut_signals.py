"""Rank of a job that is told to stop again and again, by SIGUSR1 to a random rank at a random time.

Each time the ranks train on from where they stopped, coupled by a gloo all-reduce in each update,
until all have left at one step. Rank 0 prints one JSON line: the rounds, and the latencies in ms
from kill() until all ranks knew the step.

    cut_signals.py ROUNDS SEED native|python|mpi
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from spotspeed import events
from spotspeed.config import CoordinatorConfig, parse_block
from spotspeed.coordinator.bootstrap import bootstrap, connect_ranks
from spotspeed.coordinator.coordinator import Coordinator, Cut, GateVerdict

STEP_S = 0.01


class Saver:
    """Saves in no time and checks that the state does not move meanwhile."""

    def __init__(self) -> None:
        self.coordinator: Coordinator
        self.completed = 0
        self.is_updating = False
        self.cuts: list[int] = []
        self.outcome: str | None = None
        self.agreed_at = 0.0

    def on_notice(self, source: str, seconds_left: float) -> None: ...

    def on_agreed(self, cut: Cut) -> None: ...

    def on_capture(self, cut: Cut) -> None:
        assert not self.is_updating and self.completed == cut.step, (self.completed, cut)
        self.cuts.append(cut.step)
        self.coordinator.report_staged(cut.round)
        self.coordinator.report_durable(cut.round, f"{cut.attempt}@{cut.step}")

    def on_outcome(self, cut: Cut, digest: str | None, why: str) -> None:
        self.outcome = digest

    def on_peer_lost(self, rank: int, why: str) -> None:
        os._exit(90)

    def leave(self, why: str) -> None:
        os._exit(91)

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.Agreed):
            self.agreed_at = time.monotonic()


def work(rng: random.Random) -> None:
    """What a main thread does between two updates; some of it holds the GIL, or a core."""
    kind, end = rng.randrange(4), time.monotonic() + STEP_S * rng.uniform(0.2, 1.5)
    if kind == 0:
        time.sleep(end - time.monotonic())
    elif kind == 1:
        matrix = torch.ones(256, 256)
        while time.monotonic() < end:
            matrix = matrix @ matrix / 256
    elif kind == 2:
        while time.monotonic() < end:
            sum(range(1000))


def train(saver: Saver, step: int, rng: random.Random) -> int:
    coordinator, one = saver.coordinator, torch.ones(1)
    saver.completed = step
    assert coordinator.start(step) is GateVerdict.GO
    while True:
        work(rng)
        dist.all_reduce(one)
        if coordinator.gate(step + 1) is GateVerdict.LEAVE:
            return step
        saver.is_updating = True
        dist.all_reduce(one)
        step += 1
        saver.completed, saver.is_updating = step, False
        coordinator.completed(step)


def one_round(step: int, rng: random.Random, own: random.Random, kind: str) -> dict[str, object]:
    """Train until a signal has stopped all ranks; the victims and delays are the same draw."""
    rank, size = dist.get_rank(), dist.get_world_size()
    victims, delay_s = rng.sample(range(size), rng.choice((1, 1, 2))), rng.uniform(0.0, 0.1)
    saver, killed_at = Saver(), float("inf")
    if kind == "mpi":
        transport = connect_ranks(CoordinatorConfig(transport="mpi"), rank, size)
    else:
        transport = bootstrap(rank=rank, world_size=size, is_native=kind == "native")
    block = {"path": "/unused", "notice": {"signals": ["SIGUSR1"]}}
    saver.coordinator = Coordinator(transport, parse_block(block), saver)
    events.add_sink(saver)
    saver.coordinator.exchange("ready", b"")

    def kill() -> None:
        nonlocal killed_at
        killed_at = time.monotonic()
        os.kill(os.getpid(), signal.SIGUSR1)

    timer = threading.Timer(delay_s, kill)
    if rank in victims:
        timer.start()
    last = train(saver, step, own)
    timer.join() if rank in victims else None
    assert saver.coordinator.close(10.0) is GateVerdict.LEAVE
    events.remove_sink(saver)
    assert saver.cuts == [last], (saver.cuts, last)
    return {"step": last, "outcome": saver.outcome, "agreed": saver.agreed_at, "kill": killed_at}


def main() -> None:
    rounds, seed, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo")
    events.remove_sink(events.log_sink)
    rng, own = random.Random(seed), random.Random(seed * 1000 + dist.get_rank())
    step, told = 0, []
    for _ in range(rounds):
        mine = one_round(step, rng, own, kind)
        found: list[dict] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, mine)
        step = int(found[0]["step"])
        assert {(one["step"], one["outcome"]) for one in found} == {(step, f"c0001@{step}")}, found
        told.append(1000 * (max(one["agreed"] for one in found)
                            - min(one["kill"] for one in found)))  # fmt: skip
    if dist.get_rank() == 0:
        sys.stdout.write(json.dumps({"rounds": rounds, "step": step, "latency_ms": told}) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
