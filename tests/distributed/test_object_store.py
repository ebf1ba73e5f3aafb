"""The main job on an object store: a real S3 server, ranks that are killed, and other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import spotspeed
from spotspeed.agent.process import log_directory
from spotspeed.checkpoint.catalog import find
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.staging.client import find_saver
from spotspeed.staging.launch import saver_address
from spotspeed.storage import open_storage
from tests.distributed.job import LIMIT_S, Job
from tests.object_stores import ObjectStore, serve

pytestmark = [pytest.mark.ranks, pytest.mark.full]
EVERY = 4
TOLERANCE = 2e-3
"""Largest difference of the loss that another order of summation may make."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with serve("s3", tmp_path_factory.mktemp("s3") / "server") as store:
        yield store


def test_on_s3_what_two_killed_ranks_have_staged_is_sealed_and_resumed_by_three(
    server: ObjectStore, tmp_path: Path
) -> None:
    url = f"{server.url}/run"
    block = {"path": url, "interval": {"steps": EVERY, "seconds": None}}
    job = Job(tmp_path / "job", 2, block)
    with job.start(2) as launch:
        launch.wait_step(2 * EVERY + 1)
        session = find_saver(url)
        assert session is not None
        saver = psutil.Process(session.saver_pid)
        session.close()
        for process in launch.ranks().values():
            process.kill()
        assert launch.finish().returncode != 0
    saver.wait(LIMIT_S)
    before = {record["step"]: record["loss"] for record in launch.records()}
    newest = spotspeed.list_checkpoints(url)[0].step
    # The kill may come before the second save is staged, but not before the first one is sealed:
    # there is one save at a time.
    assert newest in range(EVERY, max(before) + 1, EVERY)
    with job.start(3, steps=newest + 4) as launch:
        finished = launch.finish()
    assert finished.returncode == 0, finished.output[-6000:]
    records = launch.records()
    assert records[0]["step"] == newest + 1
    for record in records:
        if record["step"] in before:
            assert abs(record["loss"] - before[record["step"]]) < TOLERANCE
    check_whole(url, newest + 4)
    check_silent(job, url, server.environment["AWS_SECRET_ACCESS_KEY"])


def test_a_wrong_secret_is_refused_and_told_to_nobody(
    server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "WRONG/secret+of_this-test=0123456789abcd"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", wrong)
    url = f"{server.url}/refused"
    job = Job(tmp_path / "job", 2, {"path": url, "interval": {"steps": EVERY, "seconds": None}})
    with job.start(1, steps=EVERY) as launch:
        finished = launch.finish()
    assert finished.returncode not in (0, 75, 76), finished.output[-6000:]
    assert "check the credentials" in finished.output, finished.output[-6000:]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.environment["AWS_SECRET_ACCESS_KEY"])
    check_silent(job, url, wrong)


def check_whole(url: str, step: int) -> None:
    """The newest checkpoint is of `step`, every byte of it is right, and no claim is left open."""
    storage = open_storage(url)
    info = find(storage)
    assert (info.step, info.world_size) == (step, 3)
    reader = CheckpointReader.open(storage, info.directory, digest=info.digest)
    assert reader.find_damage().is_whole


def check_silent(job: Job, url: str, secret: str) -> None:
    """The secret is in no object of the store, no output or event of the job, no saver's log."""
    assert len(secret) > 12
    storage = open_storage(url)
    for info in storage.list():
        assert secret.encode() not in storage.get(info.key, info.size_bytes), info.key
    logs = [log_directory() / f"{saver_address(url)}.log"]
    files = [path for path in job.folder.rglob("*") if path.is_file()]
    assert any(path.name.startswith("output-") and path.stat().st_size for path in files)
    for file in [*files, *(log for log in logs if log.exists())]:
        assert secret.encode() not in file.read_bytes(), file
