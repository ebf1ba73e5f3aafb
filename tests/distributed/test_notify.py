"""`spotspeed notify` and `spotspeed emulate`: a running job hears them and becomes durable."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spotspeed.supervisor.notifying import paths_here
from spotspeed.testing.metadata import MetadataService
from tests.distributed.job import Job
from tests.ranks import ROOT

pytestmark = pytest.mark.ranks
SPOTSPEED = (sys.executable, "-m", "spotspeed")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SPOTSPEED, *words], cwd=ROOT, capture_output=True, text=True, timeout=200
    )


def test_notify_with_wait_returns_when_the_last_step_is_durable(tmp_path: Path) -> None:
    job = Job(tmp_path / "job")
    with job.start(2) as launch:
        launch.wait_step(3)
        assert str(job.path) in paths_here(), "--all would tell it as well"
        done = run("notify", str(job.path), "--wait", "--deadline", "60", "--json")
        sealed = job.sealed()
        finished = launch.finish()
    assert done.returncode == 0, done.stderr
    told = [{"path": str(job.path), "epoch": 1, "is_durable": True}]
    assert json.loads(done.stdout) == told
    assert sealed[0] == launch.records()[-1]["step"], "sealed when notify returned"
    assert finished.returncode == 75, finished.output[-6000:]
    assert "source=notify" in finished.output or "durable at step" in finished.output


def test_notify_says_when_nobody_is_there_to_hear_it(tmp_path: Path) -> None:
    done = run("notify", str(tmp_path / "nothing"), "--wait")
    assert done.returncode != 0
    assert "no job on this machine" in done.stderr


def test_a_job_leaves_durable_on_a_cloud_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path / "job")
    with MetadataService("gce") as service:
        for name, value in service.environ.items():
            monkeypatch.setenv(name, value)
        with job.start(1) as launch:
            launch.wait_step(3)
            service.announce(90.0)
            finished = launch.finish()
    assert finished.returncode == 75, finished.output[-6000:]
    assert job.sealed()[0] == job.records()[-1]["step"]


def test_a_notice_before_there_is_anything_to_save_asks_for_another_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path / "job")
    words = [*SPOTSPEED, "emulate", "ec2", "--after", "0", "--left", "90"]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as service:
        assert service.stdout is not None
        try:
            name, _, value = service.stdout.readline().removeprefix("export ").partition("=")
            monkeypatch.setenv(name, value.strip())
            with job.start(1) as launch:
                finished = launch.finish()
        finally:
            service.send_signal(signal.SIGTERM)
        assert service.wait(20) == 0
    assert finished.returncode in (75, 76), finished.output[-6000:]
    assert (finished.returncode == 75) is bool(job.sealed())
