"""`spotspeed certify`: a job that resumes exactly, and one that keeps something to itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spotspeed.rehearsal import VARIABLE, Rehearsal
from tests.distributed.job import ENDLESS, LIMIT_S, SIZE, TRAIN, Job, by_mpirun, ds_config, scripts
from tests.ranks import ROOT, free_port, rank_environment, remove_shared_memory

PIPE = ROOT / "tests" / "distributed" / "drivers" / "pipe_job.py"
HIDDEN = """
_calls = iter(range(1_000_000))
_forward = GPT.forward
GPT.forward = lambda self, *a, **k: _forward(self, *a, **k) * (1 + 1e-3 * next(_calls))
"""

TWO = """
import deepspeed, torch
for _ in range(2):
    model = torch.nn.Linear(4, 4)
    deepspeed.initialize(model=model, model_parameters=model.parameters(), config={{
        "train_micro_batch_size_per_gpu": 1, "spotspeed": {{"path": "{path}"}},
        "optimizer": {{"type": "AdamW", "params": {{"torch_adam": True}}}}}})
"""


def certify(
    folder: Path, script: Path, ranks: int, *more: str, stage: int = 2
) -> tuple[int, dict[str, Any], str]:
    """Exit code, certificate, and what else was said."""
    config = folder / "ds_config.json"
    config.write_text(json.dumps(ds_config(stage, {"path": str(folder / "checkpoints")})))
    port = free_port()
    command = [scripts("spotspeed"), "certify", "--steps", "1", "--json", *more, "--",
               *by_mpirun(ranks, port), str(script), "--config", str(config), "--steps",
               str(ENDLESS), "--log", str(folder / "losses"), *SIZE]  # fmt: skip
    try:
        done = subprocess.run(command, cwd=folder, env=rank_environment(port), timeout=LIMIT_S,
                              capture_output=True, text=True, check=False)  # fmt: skip
    finally:
        remove_shared_memory(port)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.mark.full
def test_a_job_that_resumes_exactly_gets_a_certificate(tmp_path: Path) -> None:
    code, found, said = certify(tmp_path, TRAIN, 2)
    assert code == 0 and found["is_exact"] and not found["differences"], said
    assert (found["ranks"], found["resumed_after_step"], found["last_step"]) == (2, 1, 2)
    assert found["losses"] == 2 * 6 and found["tensors"] > 50
    assert found["size_bytes"] > 1e5
    assert not (tmp_path / "checkpoints").exists(), "the job's own path is only read"
    assert not list(tmp_path.glob("spotspeed-certify-*"))


@pytest.mark.full
def test_a_job_that_has_trained_is_certified_from_its_newest_checkpoint(tmp_path: Path) -> None:
    """Its script calls backward of the loss, not of the engine."""
    text = TRAIN.read_text()
    assert "engine.backward(loss)" in text
    script = tmp_path / "train.py"
    script.write_text(text.replace("engine.backward(loss)", "loss.backward()"))
    job = Job(tmp_path, script=script)
    with job.start(1, steps=3) as launch:
        assert launch.finish().returncode == 0, launch.output[-4000:]
    before = contents(job.path)
    code, found, said = certify(tmp_path, script, 1)
    assert code == 0 and found["is_exact"], said
    steps = found["first_step"], found["resumed_after_step"], found["last_step"]
    assert steps == (4, 4, 5) and found["losses"] == 2 * 6
    assert contents(job.path) == before, "the job's own path is only read"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.full
def test_a_pipeline_is_certified_by_the_losses_of_its_last_stage(tmp_path: Path) -> None:
    code, found, said = certify(tmp_path, PIPE, 2, stage=1)
    assert code == 0 and found["is_exact"], said
    assert (found["ranks"], found["first_step"], found["last_step"]) == (2, 1, 2)
    assert found["losses"] == 2 * 6


@pytest.mark.full
def test_what_a_job_keeps_to_itself_is_found_and_named(tmp_path: Path) -> None:
    text = TRAIN.read_text()
    script = tmp_path / "train.py"
    at = text.index("def main(")
    script.write_text(text[:at] + HIDDEN.strip() + "\n\n\n" + text[at:])
    code, found, said = certify(tmp_path, script, 1, "--scratch", str(tmp_path / "kept"))
    assert code == 1 and not found["is_exact"], said
    first = found["differences"][0]
    assert first["what"] == "loss after the resume" and "the first at step 2" in first["how"]
    # One step by a loss that is off by a thousandth: Adam divides most of that out of the weights.
    assert any("exp_avg" in each["what"] for each in found["differences"])
    assert (tmp_path / "kept").exists()


def test_a_second_engine_is_refused_in_a_rehearsal(tmp_path: Path) -> None:
    rehearsal = Rehearsal(str(tmp_path / "scratch"), 1, str(tmp_path / "losses"), True)
    (tmp_path / "two.py").write_text(TWO.format(path=tmp_path / "own"))
    port = free_port()
    env = {**rank_environment(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
           VARIABLE: rehearsal.encode()}  # fmt: skip
    try:
        done = subprocess.run([sys.executable, "-m", "spotspeed.run", str(tmp_path / "two.py")],
                              cwd=ROOT, env=env, timeout=LIMIT_S, capture_output=True, text=True,
                              check=False)  # fmt: skip
    finally:
        remove_shared_memory(port)
    assert done.returncode == 77, done.stderr[-4000:]
    assert "this script makes several engines" in done.stderr
