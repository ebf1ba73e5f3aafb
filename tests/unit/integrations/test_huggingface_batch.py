"""Trainer's own arguments, under the hook of `spotspeed.run`, keep the config's global batch."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from spotspeed.errors import ConfigError
from spotspeed.integrations.huggingface_batch import keep_global_batch

BLOCK = {"path": "/nowhere"}
FREE = {**BLOCK, "elastic": {"indivisible": "micro_batch"}}
PROGRAM = """
import json, sys
from spotspeed.integrations import huggingface
huggingface.plug_in()
from transformers import TrainingArguments
arguments = TrainingArguments(per_device_train_batch_size=4, use_cpu=True, deepspeed=sys.argv[1])
print(arguments.gradient_accumulation_steps, arguments.hf_deepspeed_config.mismatches)
"""


class Arguments:
    """The three of Trainer's arguments that are looked at."""

    def __init__(self, config: Any, micro: int) -> None:
        self.deepspeed = config
        self.per_device_train_batch_size, self.gradient_accumulation_steps = micro, 1


@pytest.mark.parametrize(("config", "expected"), [
    ({"train_batch_size": 48, "spotspeed": BLOCK}, (6, 2)),
    ({"train_batch_size": 48, "gradient_accumulation_steps": "auto", "spotspeed": BLOCK}, (6, 2)),
    ({"train_batch_size": 32, "spotspeed": BLOCK}, (6, 1)),
    ({"train_batch_size": 32, "spotspeed": FREE}, (4, 2)),
    ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 6, "spotspeed": FREE}, (6, 1)),
    ({"train_batch_size": 33, "spotspeed": FREE}, (6, 1)),
    ({"train_batch_size": 48, "gradient_accumulation_steps": 1, "spotspeed": BLOCK}, (6, 1)),
    ({"train_batch_size": "auto", "spotspeed": BLOCK}, (6, 1)),
    ({"train_batch_size": 48}, (6, 1)),
])  # fmt: skip
def test_the_accumulation_follows_from_the_number_of_ranks(
    config: dict[str, Any], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for given in (config, json.dumps(config)):
        arguments = Arguments(given, 6)
        keep_global_batch(arguments)
        found = (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps)
        assert found == expected


def test_a_wrong_block_is_one_error() -> None:
    with pytest.raises(ConfigError, match="pathh: unknown key"):
        keep_global_batch(Arguments({"train_batch_size": 8, "spotspeed": {"pathh": "x"}}, 2))


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None
    or importlib.util.find_spec("accelerate") is None,
    reason='needs transformers and accelerate: pip install "spotspeed[huggingface]"',
)
def test_trainer_finds_nothing_that_does_not_match() -> None:
    config = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": "auto",
              "gradient_accumulation_steps": "auto",
              "zero_optimization": {"stage": 2}, "spotspeed": BLOCK}  # fmt: skip
    words = [sys.executable, "-c", PROGRAM, json.dumps(config)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "3 []", done.stdout + done.stderr
