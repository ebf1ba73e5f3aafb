"""A SIGKILL at each labelled point of a save, to each of those who take part in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT, free_port, rank_environment

POINTS = ["before staging", "mid-staging", "staged", "mid-write", "before the receipt",
          "before the seal"]  # fmt: skip
VICTIMS = ["0", "1", "all", "saver"]
COVER = [("mid-staging", "saver"), ("mid-write", "all"), ("before the seal", "0")]
ALL_ROUNDS = int(os.environ.get("KILL_ROUNDS", "20"))
"""All of them take a quarter of an hour with `-n 3 --dist load`: most of a round is waiting."""


def play(path: Path, point: str, victim: str, rounds: int) -> None:
    """Run the rounds; the driver checks each one."""
    command = [sys.executable, "-m", "tests.distributed.drivers.killing_rounds"]
    run = subprocess.run(
        [*command, str(path), point, victim, str(rounds)], cwd=ROOT, text=True,
        env=rank_environment(free_port(), {"PYTHONPATH": str(ROOT)}),
        capture_output=True, timeout=120 + 180 * rounds, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(("point", "victim"), COVER)
def test_a_kill_at_this_point_tears_nothing_and_loses_nothing_promised(
    point: str, victim: str, tmp_path: Path
) -> None:
    play(tmp_path / "store", point, victim, 1)


@pytest.mark.full
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("point", POINTS)
def test_many_kills_at_this_point_tear_nothing_and_lose_nothing_promised(
    point: str, victim: str, tmp_path: Path
) -> None:
    play(tmp_path / "store", point, victim, ALL_ROUNDS)
