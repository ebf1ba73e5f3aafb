"""Cuts at random moments of a real job, each one checked; benchmarks/cuts.py has more of them."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.ranks import ROOT

LIMIT_S = 400
OCCASIONS_LIMIT_S = 3000


def run(name: str, *words: str, limit_s: float = LIMIT_S) -> str:
    """What a benchmark writes; AssertionError when it fails or takes too long."""
    with subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks" / name), *words],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            # Not killed: it has ranks to take along.
            process.send_signal(signal.SIGTERM)
            raise AssertionError(process.communicate()[0]) from None
    assert process.returncode == 0, output
    return output


def test_every_notice_makes_all_ranks_durable_at_one_step():
    assert "14 of 14 durable at one step" in run(
        "cuts.py", "--saves", "12", "--stops", "2", "--ranks", "2"
    )


@pytest.mark.full
@pytest.mark.parametrize(("launcher", "ranks"), [("mpirun", "4"), ("deepspeed", "2")])
def test_a_cut_on_every_occasion_is_whole(launcher, ranks):
    words = ("--launcher", launcher, "--ranks", ranks, "--cuts", "26")
    run("cuts.py", *words, limit_s=OCCASIONS_LIMIT_S)


@pytest.mark.full
def test_a_notice_by_mpi_messages_is_whole_whatever_the_ranks_do():
    run("evidence.py", "--only", "MPI transport", "--saves", "1", limit_s=OCCASIONS_LIMIT_S)
