"""DeepSpeed's check of the batch, explained: on real configs, in processes that import it late."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from spotspeed.core.batch import Division
from spotspeed.state.batch import fitting_ranks, smaller_micro_batch

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
parsed = DeepSpeedConfig(config)
print("accepted", parsed.train_micro_batch_size_per_gpu, parsed.gradient_accumulation_steps)
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


@pytest.mark.parametrize(("config", "ranks", "expected"), [
    ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 3}, 3, Division(2, 2)),
    ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 8}, 4, Division(3, 1)),
    ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 3}, 5, None),
    ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 3}, 24, None),
    ({"train_batch_size": 24, "gradient_accumulation_steps": 5}, 2, Division(2, 6)),
    ({"train_batch_size": 14, "train_micro_batch_size_per_gpu": 4,
      "gradient_accumulation_steps": 2}, 1, Division(2, 7)),
])  # fmt: skip
def test_a_smaller_micro_batch_keeps_the_product(
    config: dict[str, Any], ranks: int, expected: Division | None
) -> None:
    assert smaller_micro_batch(config, ranks) == expected
    if expected is not None:
        assert expected.micro * expected.accumulation * ranks == config["train_batch_size"]


def test_deepspeed_takes_the_smaller_micro_batch_where_the_block_says_so() -> None:
    block = {**BLOCK, "elastic": {"indivisible": "micro_batch"}}
    config = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 5, "spotspeed": block}
    done = _parse(config, "late")
    assert done.returncode == 0 and "accepted 4 3" in done.stdout, done.stderr
    assert "each rank takes 3 of 4" in done.stderr


def test_an_error_names_the_choice_that_the_block_has() -> None:
    config = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 5, "spotspeed": BLOCK}
    done = _parse(config, "late")
    assert done.returncode == 77 and "No number of ranks fits" in done.stderr, done.stderr


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
