"""DeepSpeed's check of the batch, explained: on real configs, in processes that import it late."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from spotspeed.state.batch import fitting_ranks

PROGRAM = """
import json, sys
config, early = json.loads(sys.argv[1]), sys.argv[2] == "early"
if early:
    import deepspeed
import spotspeed
assert "deepspeed" in sys.modules or not early
assert early or "torch" not in sys.modules
if sys.argv[2] == "late":
    import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig
DeepSpeedConfig(config)
print("accepted")
"""
BLOCK = {"path": "/nowhere"}


def _parse(config: dict[str, Any], order: str) -> subprocess.CompletedProcess[str]:
    """DeepSpeed parses `config` for one rank."""
    words = [sys.executable, "-c", PROGRAM, json.dumps(config), order]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("config", "expected"), [
    ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2}, [1, 2, 3, 6]),
    ({"train_batch_size": 12, "gradient_accumulation_steps": 4}, [1, 3]),
    ({"train_batch_size": 7}, [1, 7]),
    ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2,
      "gradient_accumulation_steps": 3}, [2]),
    ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 5}, []),
    ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 5}, []),
    ({"train_micro_batch_size_per_gpu": 5}, []),
])  # fmt: skip
def test_the_numbers_of_ranks_that_fit_are_the_divisors(
    config: dict[str, Any], expected: list[int]
) -> None:
    assert fitting_ranks(config) == expected


@pytest.mark.parametrize("order", ["early", "late"])
def test_a_batch_that_does_not_divide_is_one_error_and_exit_77(order: str) -> None:
    config = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2,
              "gradient_accumulation_steps": 2, "spotspeed": BLOCK}  # fmt: skip
    done = _parse(config, order)
    assert done.returncode == 77, done.stderr
    assert done.stderr.count("Traceback") == 1
    assert 'Start it on 3 ranks, or leave "gradient_accumulation_steps" out' in done.stderr


def test_without_a_block_the_error_is_deepspeeds_own() -> None:
    config = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 5}
    done = _parse(config, "late")
    assert done.returncode == 1
    assert "AssertionError" in done.stderr and "ConfigError" not in done.stderr


def test_a_batch_that_divides_is_accepted_unseen() -> None:
    done = _parse({"train_batch_size": 12, "spotspeed": BLOCK}, "late")
    assert done.returncode == 0 and "accepted" in done.stdout, done.stderr
