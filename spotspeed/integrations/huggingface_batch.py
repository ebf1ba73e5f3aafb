"""Hugging Face Trainer on another number of ranks: its arguments keep the config's global batch.

With a number in "train_batch_size", Trainer's accumulation follows from the number of ranks, as
DeepSpeed derives it for a plain config. Trainer itself would refuse that config on any other number
of ranks, because its own arguments multiply to another batch.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spotspeed.config import find_block
from spotspeed.core.batch import divide
from spotspeed.state.batch import ACCUMULATION, MICRO, MICRO_BATCH, TRAIN

_logger = logging.getLogger("spotspeed")


def keep_global_batch(arguments: Any) -> None:
    """Set the accumulation (or, where the block says so, the micro batch) of TrainingArguments.

    Called before they are complete. Nothing happens without a block, without a number in
    "train_batch_size", where "gradient_accumulation_steps" is one too, or where no division fits:
    then Trainer says what does not match. Raises ConfigError for a block that is wrong.
    """
    config = _read(arguments.deepspeed)
    block, train = find_block(config), config.get(TRAIN)
    if block is None or type(train) is not int or _is_number(config.get(ACCUMULATION)):
        return
    ranks, micro = int(os.environ.get("WORLD_SIZE", "1")), arguments.per_device_train_batch_size
    division = divide(train, ranks, micro=micro)
    if division is None:
        return
    if division.micro != micro:
        if block.elastic.indivisible != MICRO_BATCH or _is_number(config.get(MICRO)):
            return
        _logger.warning(
            "per_device_train_batch_size is %d instead of %d: the global batch of %d does not "
            "divide otherwise by %d ranks", division.micro, micro, train, ranks,
        )  # fmt: skip
        arguments.per_device_train_batch_size = division.micro
    arguments.gradient_accumulation_steps = division.accumulation


def _read(config: Any) -> Mapping[str, Any]:
    """The DeepSpeed config as Trainer is given it: a mapping, a file's path, or its JSON."""
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, str | os.PathLike):
        return {}
    try:
        found = json.loads(Path(config).read_text() if os.path.exists(config) else str(config))
    except (OSError, ValueError):
        return {}  # Trainer reads it next, and says what is wrong.
    return found if isinstance(found, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
