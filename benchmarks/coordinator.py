"""What the agreement costs a step, and how fast all ranks know the step of a cut.

    python benchmarks/coordinator.py [--ranks N] [--signals N]

Prints one JSON document, for the native control thread and the one in Python: medians of `gate` and
`completed` in µs with nothing pending, of an exchange in ms; and over real ranks under mpirun,
whose main threads wait for data, multiply, loop in Python, keep the GIL in C, compile or wait in a
collective, the ms from a signal to one rank until all know the step. The double buffer of what a
forward changes is in benchmarks/boundary.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from spotspeed.config import parse_block
from spotspeed.coordinator.coordinator import Coordinator, Cut
from spotspeed.coordinator.local import LocalTransport
from spotspeed.coordinator.native_transport import NativeTransport
from spotspeed.coordinator.transport import Transport
from spotspeed.testing.cut_simulator import soak

ROOT = Path(__file__).resolve().parent.parent
BATCH = 10_000
ACTIVITIES = (
    "data_wait", "matmul", "python_loop", "gil_held", "torch_compile", "collective",
)  # fmt: skip


class Nobody:
    """A listener that is told nothing here."""

    def on_notice(self, source: str, seconds_left: float) -> None: ...
    def on_agreed(self, cut: Cut) -> None: ...
    def on_capture(self, cut: Cut) -> None: ...
    def on_outcome(self, cut: Cut, digest: str | None, why: str) -> None: ...
    def on_peer_lost(self, rank: int, why: str) -> None: ...
    def leave(self, why: str) -> None: ...


def steps_us(transport: Transport, batches: int = 30) -> dict[str, float]:
    """Medians over batches of calls on one rank, control thread idle."""
    block = {"path": "/unused", "notice": {"signals": []}}
    coordinator = Coordinator(transport, parse_block(block), Nobody())
    coordinator.start(0)
    gates, completions, step = [], [], 0
    for _ in range(batches):
        steps = range(step + 1, step + 1 + BATCH)
        began = time.perf_counter()
        for number in steps:
            coordinator.gate(number)
        between = time.perf_counter()
        for number in steps:
            coordinator.completed(number)
        ended = time.perf_counter()
        gates.append(1e6 * (between - began) / BATCH)
        completions.append(1e6 * (ended - between) / BATCH)
        step += BATCH
    exchanges = []
    for _ in range(300):
        began = time.perf_counter()
        coordinator.exchange("bench", b"value")
        exchanges.append(1e3 * (time.perf_counter() - began))
    coordinator.close(1.0)
    return {
        "gate_us": round(statistics.median(gates), 3),
        "completed_us": round(statistics.median(completions), 3),
        "exchange_1_rank_ms": round(statistics.median(exchanges), 3),
    }


def schedules_per_s(count: int = 2000) -> float:
    """Simulated schedules per second of processor time."""
    began = time.process_time()
    violations = soak(count)
    assert not violations, violations
    return round(count / (time.process_time() - began))


def signals_ms(ranks: int, signals: int, *, is_native: bool) -> dict[str, dict[str, float]]:
    """By activity: from a timer's signal to one rank until all know the step."""
    sys.path.insert(0, str(ROOT))
    from tests.ranks import run_ranks

    finished = run_ranks(
        ranks, "benchmarks/jobs/notice_job.py", str(signals), "native" if is_native else "python",
        *ACTIVITIES, timeout_s=120 + 20 * signals * len(ACTIVITIES),
    )  # fmt: skip
    line = next(line for line in finished.output.splitlines() if line.startswith("{"))
    return {activity: quantiles(times) for activity, times in json.loads(line).items()}


def quantiles(times: list[float]) -> dict[str, float]:
    """The times that so many share stay below."""
    ordered, last = sorted(times), len(times) - 1
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[round(share * last)], 2) for name, share in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--signals", type=int, default=30)
    options = parser.parse_args()
    found = {
        "native": steps_us(NativeTransport.of_one_rank()),
        "python": steps_us(LocalTransport()),
        "schedules_per_s": schedules_per_s(),
        "ranks": options.ranks,
        "signals": options.signals,
        "signal_until_all_know_ms": {
            kind: signals_ms(options.ranks, options.signals, is_native=kind == "native")
            for kind in ("native", "python")
        },
    }
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
