"""torchdata's StatefulDataLoader, given to `attach(state=...)`, goes on where its rank stood."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.distributed.test_small_state import run_alone

DRIVER = "tests/distributed/drivers/stateful_loader.py"
SAMPLES = 30

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.full,
    pytest.mark.skipif(
        importlib.util.find_spec("torchdata") is None, reason="needs torchdata: pip install it"
    ),
]


def seen(output: str) -> list[int]:
    """The samples that reached the engine, in order."""
    lines = [line for line in output.splitlines() if line.startswith("saw:")]
    return [json.loads(line.partition(": ")[2])[1] for line in lines]


def test_an_interrupted_epoch_has_every_sample_once_in_the_order_of_a_whole_one(
    tmp_path: Path,
) -> None:
    whole = seen(run_alone(DRIVER, str(tmp_path / "whole"), "100"))
    assert sorted(whole) == list(range(SAMPLES)) and whole != sorted(whole)
    parts = [run_alone(DRIVER, str(tmp_path / "parts"), stop) for stop in ("4", "7", "100")]
    assert [len(seen(part)) for part in parts] == [12, 9, 9]
    assert [sample for part in parts for sample in seen(part)] == whole
