"""Rank that is told to stop by a timer's signal, in the middle of something, again and again.

    notice_job.py ROUNDS native|python ACTIVITY...

The kernel sends the signal at a known moment to one rank. Rank 0 prints one JSON line: by activity
of all main threads, ms from that moment until the control threads of all ranks know the step.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from spotspeed import events
from spotspeed.config import parse_block
from spotspeed.coordinator.bootstrap import bootstrap
from spotspeed.coordinator.coordinator import Coordinator, Cut
from spotspeed.coordinator.listener import Teller
from spotspeed.core.cut_messages import Cut as AnyCut


class Saver:
    """Saves in no time."""

    def __init__(self) -> None:
        self.coordinator: Coordinator
        self.is_asked = False

    def on_notice(self, source: str, seconds_left: float) -> None: ...

    def on_agreed(self, cut: Cut) -> None: ...

    def on_capture(self, cut: Cut) -> None:
        self.is_asked = True
        self.coordinator.report_durable(cut.round, "seal")

    def on_outcome(self, cut: Cut, digest: str | None, why: str) -> None: ...
    def on_peer_lost(self, rank: int, why: str) -> None: ...
    def leave(self, why: str) -> None: ...


known_at: list[float] = []
"""When the control thread of this rank knew the step, on the clock that all ranks share."""
agreed = Teller.agreed


def note(self: Teller, cut: AnyCut, now: float) -> None:
    known_at.append(now)
    agreed(self, cut, now)


def multiply() -> None:
    matrix = torch.ones(512, 512)
    for _ in range(5):
        matrix = matrix @ matrix / 512


def loop() -> None:
    total = 0
    for number in range(100_000):
        total += number


def hold() -> None:
    """One call into C that keeps the GIL for some 100 ms."""
    sum(range(6_000_000))


def trace() -> None:
    torch._dynamo.reset()

    def step(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = torch.relu(x + 1) * 2
        return x

    torch.compile(step, backend="eager")(torch.ones(8))


ACTIVITIES: dict[str, Callable[[], None]] = {
    "data_wait": lambda: time.sleep(0.01), "matmul": multiply, "python_loop": loop,
    "gil_held": hold, "torch_compile": trace,
}  # fmt: skip


def be_busy(activity: str, saver: Saver) -> None:
    """Do that until a capture is asked for; in a collective, wait there for rank 0."""
    if activity != "collective":
        while not saver.is_asked:
            ACTIVITIES[activity]()
    else:
        while dist.get_rank() == 0 and not saver.is_asked:
            time.sleep(0.01)
        dist.broadcast(torch.zeros(1), 0)


def one_round(activity: str, rng: random.Random, is_native: bool) -> float:
    rank, size = dist.get_rank(), dist.get_world_size()
    victim, delay_s = rng.randrange(1, size), rng.uniform(0.02, 0.3)
    saver = Saver()
    transport = bootstrap(rank=rank, world_size=size, is_native=is_native)
    block = parse_block({"path": "/unused", "notice": {"signals": ["SIGALRM"]}})
    saver.coordinator = Coordinator(transport, block, saver)
    saver.coordinator.start(0)
    saver.coordinator.exchange("ready", b"")
    known_at.clear()
    sent_at = time.monotonic() + delay_s
    if rank == victim:
        signal.setitimer(signal.ITIMER_REAL, delay_s)
    be_busy(activity, saver)
    saver.coordinator.gate(1)
    saver.coordinator.close(10.0)
    found: list[tuple[float, float]] = [(0.0, 0.0)] * size
    dist.all_gather_object(found, (sent_at, known_at[0]))
    return 1e3 * (max(known for _, known in found) - found[victim][0])


def main() -> None:
    os.environ["TORCHDYNAMO_DISABLE"] = "0"  # It compiles, whatever the tests around it save.
    rounds, is_native, activities = int(sys.argv[1]), sys.argv[2] == "native", sys.argv[3:]
    dist.init_process_group("gloo")
    events.remove_sink(events.log_sink)
    Teller.agreed = note  # type: ignore[method-assign]
    rng = random.Random(1)
    told = {
        activity: [one_round(activity, rng, is_native) for _ in range(rounds)]
        for activity in activities
    }
    if dist.get_rank() == 0:
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
    dist.barrier()
    # Not through the end of the interpreter: there gloo's threads, which still let go of tensors,
    # now and then call std::terminate.
    os._exit(0)


if __name__ == "__main__":
    main()
