"""`spotspeed certify`: a job that resumes exactly, and one that keeps something to itself."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.job import LIMIT_S, SIZE, TRAIN, by_mpirun, ds_config, scripts
from tests.ranks import free_port, rank_environment, remove_shared_memory

HIDDEN = """
_calls = iter(range(1_000_000))
_forward = GPT.forward
GPT.forward = lambda self, *a, **k: _forward(self, *a, **k) * (1 + 1e-3 * next(_calls))
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
