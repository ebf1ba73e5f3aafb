"""A pipeline that is interrupted: all stages save one step, leave with 75 and go on from there."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.distributed.job import Job, new_chance
from tests.ranks import ROOT

pytestmark = [pytest.mark.ranks, pytest.mark.full]

SCRIPT = ROOT / "tests" / "distributed" / "drivers" / "pipe_job.py"
STEPS = 24


def test_an_interrupted_pipeline_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight = Job(tmp_path / "straight", stage=1, script=SCRIPT)
    with straight.start(2, steps=STEPS) as launch:
        assert launch.finish().returncode == 0, launch.output[-4000:]
    job = Job(tmp_path / "interrupted", stage=1, script=SCRIPT)
    with job.start(2) as launch:
        launch.interrupt(signal.SIGUSR1, new_chance())
        assert launch.finish().returncode == 75, launch.output[-4000:]
    reached = max(job.losses())
    assert job.sealed()[0] >= reached
    with job.start(2, steps=max(STEPS, reached + 2)) as launch:
        assert launch.finish().returncode == 0, launch.output[-4000:]
    found, expected = job.losses(), straight.losses()
    assert {step: found[step] for step in expected} == expected
