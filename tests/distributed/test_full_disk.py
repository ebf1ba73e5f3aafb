"""Training goes on over a disk that fills up, and is saved again once there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from spotspeed.checkpoint.catalog import list_sealed, scan
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.storage.local import LocalStorage
from tests.distributed.job import Job
from tests.distributed.saver_ranks import RankProcess

pytestmark = [pytest.mark.ranks, pytest.mark.full]
EVERY = 4


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for a few checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def whole(path: Path) -> list[int]:
    """Steps of the sealed checkpoints, newest first, every byte of which is right."""
    storage = LocalStorage(path)
    listed = list_sealed(storage)
    for info in listed:
        reader = CheckpointReader.open(storage, info.directory, digest=info.digest)
        assert reader.find_damage().is_whole, info.directory
    return [info.step for info in listed]


def test_training_goes_on_over_a_full_disk_and_is_saved_when_there_is_room(
    disk: Path, tmp_path: Path
) -> None:
    path, others = disk / "run", disk / "others"
    block = {"path": str(path), "interval": {"steps": EVERY, "seconds": None}, "keep": {"last": 2}}
    job = Job(tmp_path / "job", 2, block)
    with job.start(2) as launch:
        launch.wait_until(lambda: path.exists() and len(list_sealed(LocalStorage(path))) >= 1)
        # Unbuffered, or the close would fail once more on what was not written.
        with others.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:  # Somebody else takes all the room that is left.
                file.write(bytes(1 << 16))
        before = whole(path)
        full_from = launch.records()[-1]["step"]
        launch.wait_until(lambda: "no space is left" in launch.output)
        launch.wait_step(full_from + 3 * EVERY)
        assert whole(path)[0] >= before[0], "what was there before is there still, and loads"
        others.unlink()
        freed_from = launch.records()[-1]["step"]
        launch.wait_until(lambda: list_sealed(LocalStorage(path))[0].step > freed_from)
        assert launch.process.poll() is None, launch.output[-3000:]
    assert " missing" in launch.output, "the error says how much"
    assert whole(path)[0] > freed_from
    assert scan(LocalStorage(path)).damaged == ()


def test_a_limit_of_file_sizes_fails_the_save_that_exceeds_it(tmp_path: Path) -> None:
    path, limit = tmp_path / "store", ["prlimit", f"--fsize={20 << 20}"]
    with RankProcess(path, prefix=limit, host_memory_gb=0.015) as rank:
        rank.ask("reserve", size_bytes=15 << 20)
        rank.ask("stage", step=1, count=8, elements=1 << 20)
        answer = rank.ask("result", step=1)
        assert answer["error"] == "StorageError" and "ulimit -f" in answer["text"], answer
        assert "bytes of this file are missing" in answer["text"]
        assert [file for file in path.rglob("*") if file.is_file()] == []
        rank.ask("stage", step=2, count=4, elements=1 << 16)
        assert "digest" in rank.ask("result", step=2)
    assert whole(path) == [2]


def test_a_limit_below_the_staging_pool_is_told_at_once(tmp_path: Path) -> None:
    limit = ["prlimit", f"--fsize={4 << 20}"]
    with RankProcess(tmp_path / "store", prefix=limit, host_memory_gb=0.015) as rank:
        answer = rank.ask("reserve", size_bytes=15 << 20)
    assert answer["error"] == "PoolExhaustedError" and "ulimit -f" in answer["text"], answer
