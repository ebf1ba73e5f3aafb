"""The asynchronous API on real engines, and the example in the README as it stands there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import spotspeed
from tests.distributed.test_dropin import held
from tests.distributed.test_small_state import run_alone
from tests.ranks import ROOT, free_port, rank_environment, remove_shared_memory, run_ranks

DRIVER = "tests/distributed/drivers/async_api.py"
CHECKS = [node.name for node in ast.parse((ROOT / DRIVER).read_text()).body
          if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")]  # fmt: skip


@pytest.mark.full
def test_one_process_saves_and_loads_asynchronously(tmp_path: Path) -> None:
    assert held(run_alone(DRIVER, str(tmp_path)), 0) == CHECKS


@pytest.mark.ranks
def test_two_ranks_save_and_load_asynchronously(tmp_path: Path) -> None:
    output = run_ranks(2, DRIVER, str(tmp_path), timeout_s=280).output
    for rank in range(2):
        assert held(output, rank) == CHECKS


def blocks() -> list[str]:
    """The Python in the README, in its order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


DATA = """
from torch.utils.data import DataLoader, TensorDataset

model = torch.nn.Linear(16, 4)
loader = DataLoader(TensorDataset(torch.randn(9, 16)), batch_size=2)
engine, _, _, _ = deepspeed.initialize(
    model=model, model_parameters=model.parameters(),
    config={**config, "spotspeed": {"path": "data"}},
)
"""
"""What the README's example of a loop over data leaves out; `STEP` is what its dots stand for."""
STEP = """engine.backward(engine(batch[0]).square().mean())
        engine.step()
        print("samples", len(batch[0]))"""


def test_the_readme_has_four_examples_of_which_one_is_an_excerpt_of_the_example_script() -> None:
    excerpt, *_ = found = blocks()
    assert len(found) == 4, "a new one needs a test that runs it"
    script = (ROOT / "examples" / "train_gpt.py").read_text()
    for line in excerpt.splitlines():
        assert (
            line == "..."
            or "deepspeed.initialize" in line
            or line in map(str.strip, script.splitlines())
        ), line


def test_the_example_of_reading_runs_on_what_the_example_script_has_saved(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = blocks()[3].replace("/shared/checkpoints/run-7", str(trained))
    found: dict[str, Any] = {"spotspeed": spotspeed}
    exec(example, found)
    assert found["weights"].shape == (256, 64) and found["moments"].shape == (1000,)
    assert re.findall(r"^(\S+) (\d+)", capsys.readouterr().out, flags=re.MULTILINE) == [
        ("step-10", "10"), ("step-5", "5"),
    ]  # fmt: skip


def test_the_examples_of_one_call_and_of_data_run_as_they_stand(tmp_path: Path) -> None:
    _, one_call, data, _ = blocks()
    (tmp_path / "example.py").write_text(one_call + DATA + data.replace("...\n", STEP + "\n"))
    port = free_port()
    env = {**rank_environment(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
           "PYTHONPATH": str(ROOT)}  # fmt: skip
    try:
        done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env=env, timeout=200,
                              capture_output=True, text=True)  # fmt: skip
    finally:
        remove_shared_memory(port)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "durable at step 10" in done.stdout and "back at step 10, epoch 1" in done.stdout
    assert re.findall(r"^samples (\d)", done.stdout, flags=re.MULTILINE) == [*"22221"] * 3
