"""The main job on real ranks: interrupted at any moment, it goes on as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.distributed.conftest import REFERENCE_STEPS, References
from tests.distributed.job import Job, Launcher, by_deepspeed, by_mpirun, new_chance

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(("stage", "launcher", "number"), [
    pytest.param(2, by_mpirun, signal.SIGUSR1, id="zero2-mpirun-SIGUSR1"),
    pytest.param(1, by_deepspeed, signal.SIGTERM, id="zero1-deepspeed-SIGTERM",
                 marks=pytest.mark.full),
    pytest.param(0, by_mpirun, signal.SIGUSR1, id="zero0-mpirun", marks=pytest.mark.full),
    pytest.param(3, by_mpirun, signal.SIGUSR1, id="zero3-mpirun", marks=pytest.mark.full),
])  # fmt: skip
def test_after_an_interruption_the_losses_are_bitwise_those_of_deepspeed_alone(
    stage: int, launcher: Launcher, number: signal.Signals, tmp_path: Path, references: References
) -> None:
    interrupt_and_resume(Job(tmp_path / "job", stage), launcher, number, references)


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
def test_a_notice_among_saves_of_every_step_resumes_bitwise(
    stage: int, tmp_path: Path, references: References
) -> None:
    block = {"interval": {"steps": 1, "seconds": None}, "keep": {"last": 2}}
    interrupt_and_resume(Job(tmp_path / "job", stage, block), by_mpirun, signal.SIGUSR1, references)


def interrupt_and_resume(
    job: Job, launcher: Launcher, number: signal.Signals, references: References, code: int = 75
) -> None:
    """Two ranks, one signal to one of them, the launcher's `code`, then two ranks again."""
    with job.start(2, launcher=launcher) as launch:
        launch.interrupt(number, new_chance())
        finished = launch.finish()
    assert finished.returncode == code, finished.output[-6000:]
    assert "leaving with 75" in finished.output, finished.output[-6000:]
    last = launch.records()[-1]["step"]
    assert job.sealed()[0] == last, "what was trained and what is durable are one step"
    until = last + 6
    assert until <= REFERENCE_STEPS, f"interrupted too late, at step {last}"
    with job.start(2, launcher=launcher, steps=until) as launch:
        finished = launch.finish()
    assert finished.returncode == 0, finished.output[-6000:]
    assert launch.records()[0]["step"] == last + 1
    reference = references.losses(job.stage)
    assert job.losses() == {step: reference[step] for step in range(1, until + 1)}
    assert job.sealed()[0] == until
