"""The tier of a node with real savers and ranks that are killed between the disk and the store."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spotspeed.checkpoint.tiers import open_node, survey
from spotspeed.staging.client import find_saver
from tests.distributed.drivers.saver_rank import ticket_of
from tests.distributed.job import Job
from tests.distributed.saver_ranks import RankProcess, check_sealed, wait_gone

SMALL = {"count": 4, "elements": 1 << 16}


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A store that is not there yet; the test leaves no saver behind for it."""
    path = tmp_path / "store"
    yield path
    if path.is_file():
        path.unlink()
    session = find_saver(str(path))
    if session is not None:
        pid = session.saver_pid
        session.close()
        wait_gone(pid)


def take_away(path: Path) -> None:
    """Where the store's directory belongs lies a file from now on: nothing can be written."""
    path.write_text("the store is away")


@pytest.fixture
def local_path(tmp_path: Path) -> Path:
    return tmp_path / "nvme"


def test_ranks_killed_while_their_state_is_on_the_node_only_lose_nothing(
    path: Path, local_path: Path
) -> None:
    with RankProcess(path, local_path=local_path) as rank:
        saver = rank.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        take_away(path)
        rank.ask("stage", step=3, **SMALL)
        assert rank.ask("wait_level", step=3, level="node") == {"level": "node"}
        assert any(event.startswith("kept") for event in rank.ask("facts")["events"])
        rank.kill()
    path.unlink()
    wait_gone(saver)
    check_sealed(path, 3, world_size=1, **SMALL)
    (found,) = survey(open_node(str(local_path), str(path)))
    assert found.is_sealed


def test_after_a_killed_saver_the_next_launch_seals_what_lay_on_the_node(
    path: Path, local_path: Path
) -> None:
    with RankProcess(path, local_path=local_path) as rank:
        saver = rank.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        take_away(path)
        rank.ask("stage", step=3, **SMALL)
        rank.ask("wait_level", step=3, level="node")
        os.kill(saver, signal.SIGKILL)
        assert f"saver process {saver} died" in rank.ask("result", step=3)["text"]
        path.unlink()
        # The same process is the next launch: what counts is that its saver is another one.
        drained = rank.ask("drain", before_epoch=2)
        assert drained == {"sealed": [ticket_of(3, 1).directory], "stored": [], "failed": []}
        check_sealed(path, 3, world_size=1, **SMALL)
        rank.ask("stage", step=4, epoch=2, **SMALL)
        assert "digest" in rank.ask("result", step=4)
        assert rank.ask("wait_level", step=4, level="remote") == {"level": "remote"}


@pytest.mark.full
@pytest.mark.parametrize("seed", range(4))
def test_a_saver_killed_at_any_moment_of_draining_leaves_what_the_next_one_completes(
    seed: int, path: Path, local_path: Path
) -> None:
    large, steps = {"count": 8, "elements": 1 << 20}, (1, 2, 3)
    with RankProcess(path, local_path=local_path, host_memory_gb=0.2) as rank:
        saver = rank.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        for step in steps:
            rank.ask("stage", step=step, **large)
        for step in steps:
            rank.ask("wait_level", step=step, level="node")
        time.sleep(random.Random(seed).uniform(0, 0.3))  # the moment of the kill
        os.kill(saver, signal.SIGKILL)
        rank.ask("result", step=steps[-1])
        drained = rank.ask("drain", before_epoch=2)
    # An older leftover may have been overtaken, and is dropped then; the newest never is.
    assert ticket_of(3, 1).directory not in drained["failed"]
    check_sealed(path, 3, world_size=1, **large)


@pytest.mark.full
@pytest.mark.ranks
def test_a_job_resumes_from_the_node_what_is_damaged_at_the_store(tmp_path: Path) -> None:
    node = tmp_path / "nvme"
    block = {"local_path": str(node), "interval": {"steps": 2, "seconds": None}}
    job = Job(tmp_path / "job", 2, block)
    with job.start(2, steps=4) as launch:
        finished = launch.finish()
    assert finished.returncode == 0, finished.output[-6000:]
    assert job.sealed()[0] == 4
    newest = sorted(job.path.glob("step-*"))[-1]
    for shard in newest.glob("*.shard"):
        data = bytearray(shard.read_bytes())
        data[4096:8192] = bytes(4096)
        shard.write_bytes(data)
    with job.start(2, steps=6) as launch:
        finished = launch.finish()
    assert finished.returncode == 0, finished.output[-6000:]
    assert next(record["step"] for record in launch.records()) == 5
    (run,) = node.iterdir()
    assert [place.name[:17] for place in sorted(run.glob("step-*"))] == ["step-000000000006"]


@pytest.mark.full
@pytest.mark.ranks
def test_a_tier_inside_the_store_refuses_the_launch_for_good(tmp_path: Path) -> None:
    job = Job(tmp_path / "job", 2, {"local_path": str(tmp_path / "job" / "checkpoints" / "fast")})
    with job.start(2, steps=2) as launch:
        finished = launch.finish()
    assert finished.returncode == 77, finished.output[-6000:]
    assert "lies inside `path`" in finished.output
