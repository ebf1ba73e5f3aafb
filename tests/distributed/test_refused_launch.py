"""A launch that no new start can cure leaves with 77 on every way in, and says why once a rank."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.job import SIZE, TRAIN, Job, Launch, by_deepspeed, by_mpirun, ds_config
from tests.distributed.test_bad_input import contents, only_checkpoints
from tests.ranks import Finished, free_port

pytestmark = pytest.mark.ranks
RANKS = 2


def check(finished: Finished, error: str, *says: str) -> None:
    """Exit 77 and one error a rank, which has no other error behind it."""
    assert finished.returncode == 77, finished.output[-6000:]
    assert all(part in finished.output for part in says), finished.output[-6000:]
    assert 1 <= finished.output.count(f"{error}: ") <= RANKS
    assert "During handling" not in finished.output
    assert "direct cause" not in finished.output


def launch(job: Job, config: dict[str, Any], *arguments: str) -> Finished:
    """The example under mpirun, with more arguments than a Job gives."""
    job.folder.mkdir(parents=True, exist_ok=True)
    file = job.folder / "config.json"
    file.write_text(json.dumps(config))
    port = free_port()
    words = [*by_mpirun(RANKS, port), str(TRAIN), "--config", str(file), "--steps", "3", *SIZE]
    with Launch(job, port, [*words, *arguments]) as launched:
        return launched.finish()


def test_an_unknown_key_ends_the_script_before_anything_is_written(tmp_path: Path) -> None:
    job = Job(tmp_path / "job")
    block = {"path": str(job.path), "pathh": "x"}
    finished = launch(job, ds_config(2, block))
    check(finished, "ConfigError", 'pathh: unknown key; did you mean "path"?')
    assert not job.path.exists()


def test_a_checkpoint_of_another_model_ends_the_script_and_stays_as_it_was(
    tmp_path: Path, trained: Path
) -> None:
    job = Job(tmp_path / "job")
    shutil.copytree(trained, job.path)
    before = contents(job.path)
    finished = launch(job, ds_config(2, {"path": str(job.path)}), "--width", "96")
    check(finished, "InvalidLayoutError", "stored shape (256, 64), here (256, 96)")
    assert only_checkpoints(contents(job.path)) == only_checkpoints(before)


def test_a_batch_that_does_not_divide_names_the_numbers_of_ranks_that_fit(
    tmp_path: Path, plain_script: Path
) -> None:
    job = Job(tmp_path / "job", script=plain_script, is_plain=True)
    config = ds_config(2, {"path": str(job.path)}, batch=9)
    with job.start(RANKS, launcher=by_deepspeed, config=config) as launched:
        finished = launched.finish()
    check(finished, "ConfigError", "does not divide by 2 ranks", "Start it on 1, 3, 9 ranks")
    assert not job.path.exists()
