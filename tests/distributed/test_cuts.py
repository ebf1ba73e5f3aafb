"""Cuts at random moments of a real job, each one checked; benchmarks/cuts.py has more of them."""

from __future__ import annotations

import subprocess
import sys

from tests.ranks import ROOT

LIMIT_S = 400


def test_every_notice_makes_all_ranks_durable_at_one_step():
    finished = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "cuts.py"), "--saves", "12", "--stops", "2"],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout
    assert "14 of 14 durable at one step" in finished.stdout, finished.stdout
