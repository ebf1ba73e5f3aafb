"""What the agreement costs a step, and how fast all ranks know the step of a cut.

    python benchmarks/coordinator.py [--ranks N] [--signals N]

Prints one JSON document: medians of `gate` and `completed` in µs with nothing pending, the cost of
an exchange among threads of this process in ms, and over real ranks under mpirun, whose main
threads sleep, multiply, run Python or wait in collectives, the ms from kill() until all know.
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
from spotspeed.testing.cut_simulator import soak

ROOT = Path(__file__).resolve().parent.parent
BATCH = 10_000


class Nobody:
    """A listener that is told nothing here."""

    def on_notice(self, source: str, seconds_left: float) -> None: ...
    def on_capture(self, cut: Cut) -> None: ...
    def on_outcome(self, cut: Cut, digest: str | None, why: str) -> None: ...
    def on_peer_lost(self, rank: int, why: str) -> None: ...
    def leave(self, why: str) -> None: ...


def steps_us(batches: int = 30) -> dict[str, float]:
    """Medians over batches of calls on one rank, control thread idle."""
    block = {"path": "/unused", "notice": {"signals": []}}
    coordinator = Coordinator(LocalTransport(), parse_block(block), Nobody())
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


def signals_ms(ranks: int, signals: int) -> dict[str, float]:
    """From kill() of one or two ranks until all know the step, over so many rounds."""
    sys.path.insert(0, str(ROOT))
    from tests.ranks import run_ranks

    driver = "tests/distributed/drivers/cut_signals.py"
    finished = run_ranks(ranks, driver, str(signals), "7", timeout_s=60 + 4 * signals)
    line = next(line for line in finished.output.splitlines() if line.startswith("{"))
    times = sorted(json.loads(line)["latency_ms"])
    last = len(times) - 1
    quantiles = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(times[round(q * last)], 2) for name, q in quantiles.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--signals", type=int, default=100)
    options = parser.parse_args()
    found = {
        **steps_us(),
        "schedules_per_s": schedules_per_s(),
        "ranks": options.ranks,
        "signals": options.signals,
        "signal_until_all_know_ms": signals_ms(options.ranks, options.signals),
    }
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
