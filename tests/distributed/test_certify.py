"""`spotspeed certify`: a job that resumes exactly, and one that keeps something to itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spotspeed.rehearsal import VARIABLE, Rehearsal
from tests.distributed.job import LIMIT_S, SIZE, TRAIN, by_mpirun, ds_config, scripts
from tests.ranks import ROOT, free_port, rank_environment, remove_shared_memory

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


def certify(folder: Path, script: Path, ranks: int, *more: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, certificate, and what else was said."""
    config = folder / "ds_config.json"
    config.write_text(json.dumps(ds_config(2, {"path": str(folder / "checkpoints")})))
    port = free_port()
    command = [scripts("spotspeed"), "certify", "--steps", "1", "--json", *more, "--",
               *by_mpirun(ranks, port), str(script), "--config", str(config), *SIZE]  # fmt: skip
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
    assert not (tmp_path / "checkpoints").exists(), "the job's own path is only read"
    assert not list(tmp_path.glob("spotspeed-certify-*"))


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
    assert any("fp32" in each["what"] for each in found["differences"])
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
