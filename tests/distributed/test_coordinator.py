"""The agreement among real ranks, with real signals and real deaths."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT, free_port, rank_environment, run_ranks

DRIVERS = Path("tests/distributed/drivers")
SEED = 20_240_607


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("kind", "rounds"),
    [
        ("native", 12),
        ("python", 5),
        pytest.param("mpi", 5, marks=pytest.mark.full),
    ],
)
def test_a_signal_to_any_rank_at_any_time_stops_all_ranks_at_one_saved_step(
    kind: str, rounds: int
) -> None:
    finished = run_ranks(4, DRIVERS / "cut_signals.py", str(rounds), str(SEED), kind, timeout_s=180)
    line = next(line for line in finished.output.splitlines() if line.startswith("{"))
    found = json.loads(line)
    latency_ms = sorted(found["latency_ms"])
    assert found["rounds"] == len(latency_ms) == rounds
    told = (f"seed {SEED}: kill() until all 4 ranks know the step, ms: "
            f"p50 {statistics.median(latency_ms):.2f} p90 {latency_ms[rounds * 9 // 10]:.2f} "
            f"max {latency_ms[-1]:.2f}")  # fmt: skip
    assert latency_ms[-1] < 5000, told


@pytest.mark.ranks
@pytest.mark.parametrize(("victim", "kind"), [(0, "native"), (2, "native"), (0, "python")])
def test_the_survivors_of_a_killed_rank_save_one_step_and_leave(victim: int, kind: str) -> None:
    port, last = free_port(), 20
    ranks = []
    for rank in range(3):
        names = {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen(
            [sys.executable, ROOT / DRIVERS / "cut_loss.py", str(victim), str(last), kind],
            cwd=ROOT, env=rank_environment(port, names), stdout=subprocess.PIPE, text=True,
        ))  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [-9 if r == victim else 0 for r in range(3)]
    told = [json.loads(outputs[rank].splitlines()[-1]) for rank in range(3) if rank != victim]
    assert told[0] == told[1]
    step, leader = told[0]["cut"], min({0, 1, 2} - {victim})
    assert step in (last - 1, last)
    assert told[0] == {
        "lost": [victim], "cut": step, "cut_lost": [victim],
        "digest": f"c0001t1r{leader}@{step}",
    }  # fmt: skip
