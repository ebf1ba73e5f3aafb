"""Every rank of the main job is killed without notice: what was staged is not lost."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.distributed.conftest import References
from tests.distributed.job import LIMIT_S, Job, ds_config, new_chance

pytestmark = pytest.mark.ranks
EVERY = 4
TOLERANCE = 2e-3
"""Largest difference of the loss that another order of summation may make."""


def test_after_a_kill_of_all_ranks_the_last_staged_save_is_sealed_and_resumed(
    tmp_path: Path, references: References
) -> None:
    job = Job(tmp_path / "job", 2, {"interval": {"steps": EVERY, "seconds": None}})
    with job.start(2) as launch:
        launch.wait_step(new_chance().randint(5, 7))
        refuse_a_second_job(job)
        saver = saver_of(job)
        saver.suspend()
        last = launch.records()[-1]["step"]
        staged = (last // EVERY + 2) * EVERY
        launch.wait_step(staged + 1)
        for process in launch.ranks().values():
            process.kill()
        assert launch.finish().returncode != 0
    assert job.sealed()[0] < staged, "the saver was stopped before this save"
    saver.resume()
    saver.wait(LIMIT_S)
    died_at = launch.records()[-1]["step"]
    newest = job.sealed()[0]
    assert newest in (staged, died_at // EVERY * EVERY)
    with job.start(3, steps=newest + 4) as launch:
        finished = launch.finish()
    assert finished.returncode == 0, finished.output[-6000:]
    assert launch.records()[0]["step"] == newest + 1
    reference = references.losses(2)
    for record in launch.records():
        if record["step"] in reference:
            assert abs(record["loss"] - float(reference[record["step"]])) < TOLERANCE


def refuse_a_second_job(job: Job) -> None:
    """While the job lives, another on the same path leaves with 77 and names it."""
    before = len(job.records())
    other = Job(job.folder / "other", 2)
    with other.start(1, config=ds_config(2, {"path": str(job.path)})) as launch:
        finished = launch.finish()
    assert finished.returncode == 77, finished.output[-6000:]
    assert "is owned by another job" in finished.output and '"take_over"' in finished.output
    assert finished.output.count("OwnedError") == 1
    assert not launch.records() and len(job.records()) >= before


def saver_of(job: Job) -> psutil.Process:
    """The saver process of the job's path, which the ranks have started."""
    own = [process for process in psutil.process_iter(["cmdline"])
           if str(job.path) in (process.info["cmdline"] or [])
           and "spotspeed.agent" in process.info["cmdline"]]  # fmt: skip
    assert len(own) == 1, own
    return own[0]
