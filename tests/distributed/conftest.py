"""What the tests of the main job share: the losses of runs that nothing ever interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.distributed.job import SIZE, Job, Launch, by_mpirun, ds_config, without_spotspeed
from tests.ranks import ROOT, free_port

REFERENCE_STEPS = 40
STAGES = (0, 1, 2, 3)
DRIVER = ROOT / "tests" / "distributed" / "drivers" / "references.py"


@dataclass(frozen=True, slots=True)
class References:
    """Losses of DeepSpeed alone on two ranks, `REFERENCE_STEPS` steps a stage."""

    folder: Path

    def losses(self, stage: int) -> dict[int, str]:
        """All digits of the loss by step."""
        lines = (self.folder / f"stage{stage}.jsonl").read_text().splitlines()
        return {record["step"]: repr(record["loss"]) for record in map(json.loads, lines)}

    @property
    def output(self) -> str:
        """What the ranks and mpirun wrote, together."""
        return (self.folder / "output").read_text()

    def process(self) -> dict[str, Any]:
        """What was seen in a process at its end."""
        found: dict[str, Any] = json.loads((self.folder / "threads.json").read_text())
        return found


@pytest.fixture(scope="session")
def plain_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example script with spotspeed's three lines taken out."""
    return without_spotspeed(tmp_path_factory.mktemp("plain"))


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, once for all workers that run tests side by side."""
    is_alone = "PYTEST_XDIST_WORKER" not in os.environ
    base = factory.getbasetemp() if is_alone else factory.getbasetemp().parent
    folder = base / f"once-{name}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory, plain_script: Path) -> References:
    """Runs under `spotspeed.run` of a script and configs that know nothing of spotspeed."""
    return References(made_once(
        tmp_path_factory, "references", lambda folder: run_references(folder, plain_script)
    ))  # fmt: skip


def run_references(folder: Path, plain_script: Path) -> None:
    for stage in STAGES:
        (folder / f"stage{stage}.json").write_text(json.dumps(ds_config(stage, None)))
    port = free_port()
    words = [*by_mpirun(2, port), "-m", "spotspeed.run", str(DRIVER), str(folder),
             str(plain_script), "--steps", str(REFERENCE_STEPS), *SIZE]  # fmt: skip
    with Launch(Job(folder / "launch"), port, words) as launch:
        finished = launch.finish()
    assert finished.returncode == 0, finished.output[-6000:]
    (folder / "output").write_text(finished.output)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of 2 ranks at ZeRO stage 2, after 5 and after 10 steps; copy before use."""
    return job_of_trained(made_once(tmp_path_factory, "trained", train_it)).path


def job_of_trained(folder: Path) -> Job:
    return Job(folder, 2, {"interval": {"steps": 5, "seconds": None}})


def train_it(folder: Path) -> None:
    job = job_of_trained(folder)
    with job.start(2, steps=10) as launch:
        finished = launch.finish()
    assert finished.returncode == 0, finished.output[-6000:]
    assert job.sealed() == [10, 5]
