"""Scripts that call engine.save_checkpoint and load_checkpoint get what they had, and more."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import spotspeed
from tests.distributed.test_small_state import run_alone
from tests.ranks import ROOT, run_ranks

DRIVER = "tests/distributed/drivers/dropin.py"
PROCESSES = "tests/distributed/drivers/dropin_processes.py"
ONE_PATH = "tests/distributed/drivers/one_path.py"
WEIGHTS = "tests/distributed/drivers/weights_only.py"
INSTALLED = "tests/distributed/drivers/installed.py"
MOMENTS = "tests/distributed/drivers/dropin_moments.py"
CHECKS = [node.name for driver in (MOMENTS, DRIVER)
          for node in ast.parse((ROOT / driver).read_text()).body
          if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")]  # fmt: skip


def held(output: str, rank: int) -> list[str]:
    return re.findall(rf"^rank {rank}: (\w+): held$", output, flags=re.MULTILINE)


@pytest.mark.full
def test_one_process_saves_and_loads_as_with_deepspeed(tmp_path: Path) -> None:
    assert sorted(held(run_alone(DRIVER, str(tmp_path)), 0)) == sorted(CHECKS)


@pytest.mark.ranks
def test_two_ranks_save_and_load_as_with_deepspeed(tmp_path: Path) -> None:
    output = run_ranks(2, DRIVER, str(tmp_path), timeout_s=280).output
    for rank in range(2):
        assert sorted(held(output, rank)) == sorted(CHECKS)


def test_what_was_saved_outlives_its_process_whoever_it_was(tmp_path: Path) -> None:
    run_alone(PROCESSES, "exit", str(tmp_path))
    assert "loaded step 2" in run_alone(PROCESSES, "load", str(tmp_path))
    assert "saved by a daemon" in run_alone(PROCESSES, "daemon", str(tmp_path))
    assert "loaded step 3" in run_alone(PROCESSES, "load", str(tmp_path))


@pytest.mark.full
@pytest.mark.ranks
def test_another_number_of_ranks_loads_it_at_another_stage(tmp_path: Path) -> None:
    run_ranks(2, PROCESSES, "save", str(tmp_path), timeout_s=150)
    assert "loaded step 2" in run_alone(PROCESSES, "load", str(tmp_path))


def test_a_script_with_several_engines_goes_on_with_each_of_them(tmp_path: Path) -> None:
    assert "began at [0, 0]" in run_alone(INSTALLED, "first", str(tmp_path))
    for path, steps in (("path", [2]), ("path/engine-2", [3])):
        found = spotspeed.list_checkpoints(str(tmp_path / path))
        assert [info.step for info in found] == steps, path
    assert "began at [2, 3]" in run_alone(INSTALLED, "again", str(tmp_path))
    assert not (tmp_path / "path" / "engine-3").exists()


@pytest.mark.full
def test_worlds_of_one_script_share_a_path_whatever_their_models(tmp_path: Path) -> None:
    output = run_alone(ONE_PATH, str(tmp_path))
    began = dict(re.findall(r"^([a-z ]+) (\d+)$", output, flags=re.MULTILINE))
    assert began.pop("after it") == "4", "what a world has left that was killed is gone on with"
    assert len(began) == 8 and set(began.values()) == {"0"}, "those that have ended are done with"


@pytest.mark.full
@pytest.mark.ranks
@pytest.mark.parametrize("case", ["z1", "z1-bf16", "z3-bf16", "z0"])
def test_weights_alone_are_loaded_by_a_custom_function_or_without_an_optimizer(
    case: str, tmp_path: Path
) -> None:
    output = run_ranks(2, WEIGHTS, str(tmp_path), case, timeout_s=280).output
    for rank in range(2):
        assert f"rank {rank}: {case}: held" in output
