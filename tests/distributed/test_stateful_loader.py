"""torchdata's StatefulDataLoader, given to `attach(state=...)`, goes on where its rank stood."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
from pathlib import Path

import pytest

from tests.ranks import run_ranks

DRIVER = "tests/distributed/drivers/stateful_loader.py"
SAMPLES = 24

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.full,
    pytest.mark.skipif(
        importlib.util.find_spec("torchdata") is None, reason="needs torchdata: pip install it"
    ),
]


def launch(ranks: int, path: Path, stop_at: int) -> tuple[list[list[int]], str]:
    """The samples that reached the engine of each rank, in order, and all that was said."""
    output = run_ranks(ranks, DRIVER, str(path), str(stop_at), timeout_s=240).output
    found: list[list[int]] = [[] for _ in range(ranks)]
    for rank, sample in re.findall(r"saw: \[(\d+), (\d+)\]", output):
        found[int(rank)].append(int(sample))
    return found, output


def test_an_interrupted_epoch_has_every_sample_once_in_the_order_of_a_whole_one(
    tmp_path: Path,
) -> None:
    whole, _ = launch(2, tmp_path / "whole", 100)
    assert sorted(itertools.chain(*whole)) == list(range(SAMPLES)) and whole[0] != sorted(whole[0])
    parts = [launch(2, tmp_path / "parts", stop) for stop in (2, 4)]
    assert [len(seen[0]) for seen, _ in parts] == [4, 4]
    shutil.copytree(tmp_path / "parts", tmp_path / "other")
    parts.append(launch(2, tmp_path / "parts", 100))
    assert [list(itertools.chain(*(seen[rank] for seen, _ in parts))) for rank in range(2)] == whole
    assert not any("every rank has the state of rank 0" in said for _, said in parts)
    _, said = launch(1, tmp_path / "other", 5)
    assert "'data': every rank has the state of rank 0 of another number of ranks" in said
