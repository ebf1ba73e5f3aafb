"""`spotspeed doctor`: what it finds on this machine, and what it says about notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from spotspeed.build_locks import filesystem_of
from spotspeed.checkpoint.measuring import measure_store
from spotspeed.storage import open_storage


def test_the_command_measures_the_store_and_leaves_nothing_there(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "spotspeed", "doctor", str(tmp_path), "--state-gb", "1e6",
             "--local-path", str(tmp_path / "nvme"), "--json"]  # fmt: skip
    environ = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "none"), "SLURM_JOB_ID": "12"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["is_fit"] and found["write_bytes_s"] > 1e5 and found["stage_bytes_s"] > 1e7
    assert found["near_bytes_s"] > 1e5
    (place,) = [each for each in found["findings"] if each["what"] == "runs under"]
    assert place["detail"].startswith("SLURM (SLURM_JOB_ID=12")
    assert [row["notice_s"] for row in found["forecasts"]] == [120, 30, 15]
    assert [row["action"] for row in found["forecasts"]] == ["nothing newer"] * 3, "a petabyte"
    sizes = [row["largest_bytes"] for row in found["forecasts"]]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] > 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_killed_operator_build_makes_a_machine_unfit_and_is_named(tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    environ = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    os.utime(lock, (1.0, 1.0))
    words = [sys.executable, "-m", "spotspeed", "doctor", str(tmp_path / "store")]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=120, env={**os.environ, **environ}
    )
    assert done.returncode == 1, done.stderr
    assert str(lock) in done.stdout.replace("\n", "")


def test_a_measured_speed_counts_until_the_bytes_are_durable(tmp_path: Path) -> None:
    bytes_s, seal_s = measure_store(open_storage(str(tmp_path)))
    assert 1e5 < bytes_s < 1e11
    assert 0 < seal_s < 10


def test_a_store_that_takes_all_the_time_to_open_has_a_speed(tmp_path: Path) -> None:
    bytes_s, _ = measure_store(open_storage(str(tmp_path)), limit_s=0.0, limit_bytes=4096)
    assert bytes_s > 0


def test_the_file_system_is_that_of_the_innermost_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("a / ext4 rw 0 0\nb /shared nfs4 rw 0 0\nc /shared/fast lustre rw 0 0\n")
    assert filesystem_of("/shared/run", str(mounts)) == "nfs4"
    assert filesystem_of("/shared/fast/run", str(mounts)) == "lustre"
    assert filesystem_of("/sharedish", str(mounts)) == "ext4"
