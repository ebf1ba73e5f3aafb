"""The agreement among real ranks under mpirun, with real signals."""

from __future__ import annotations

import json
import statistics

import pytest

from tests.ranks import run_ranks

DRIVER = "tests/distributed/drivers/cut_signals.py"
SEED = 20_240_607


@pytest.mark.ranks
def test_a_signal_to_any_rank_at_any_time_stops_all_ranks_at_one_saved_step(
    record_property: pytest.RecordProperty,
) -> None:
    rounds = 60
    finished = run_ranks(4, DRIVER, str(rounds), str(SEED), timeout_s=180)
    line = next(line for line in finished.output.splitlines() if line.startswith("{"))
    found = json.loads(line)
    latency_ms = sorted(found["latency_ms"])
    assert found["rounds"] == len(latency_ms) == rounds
    told = (f"seed {SEED}: kill() until all 4 ranks know the step, ms: "
            f"p50 {statistics.median(latency_ms):.2f} p90 {latency_ms[rounds * 9 // 10]:.2f} "
            f"max {latency_ms[-1]:.2f}")  # fmt: skip
    record_property("latency", told)
    assert latency_ms[-1] < 5000, told
