"""Masters and optimizer state are bitwise the same on any number of ranks, at any ZeRO stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import spotspeed
from tests.distributed.job import LIMIT_S, ds_config
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks
CHAIN = ((3, 3), (1, 1), (2, 2))
"""Number of ranks and ZeRO stage, one after the other; the first was written by (2, 2)."""
FULL_CHAIN = ((3, 2), (1, 0), (2, 1), (1, 3), (3, 1), (2, 3), (3, 0))


@pytest.mark.parametrize("chain", [
    CHAIN, pytest.param(FULL_CHAIN, marks=pytest.mark.full),
])  # fmt: skip
def test_every_tensor_is_bitwise_the_same_after_each_of_several_resumes(
    chain: tuple[tuple[int, int], ...], tmp_path: Path, trained: Path
) -> None:
    path = tmp_path / "checkpoints"
    shutil.copytree(trained, path)
    expected = tensors(path, None)
    assert {kind for _, kind in expected} == {"fp32", "exp_avg", "exp_avg_sq", "step"}
    for ranks, stage in chain:
        config = tmp_path / f"{ranks}-{stage}.json"
        config.write_text(json.dumps(ds_config(stage, {"path": str(path)})))
        tag = f"on-{ranks}-stage-{stage}"
        run_ranks(ranks, "tests/distributed/drivers/resave.py", str(config), tag,
                  timeout_s=LIMIT_S)  # fmt: skip
        found = tensors(path, tag)
        assert found.keys() == expected.keys()
        different = [key for key in expected if found[key] != expected[key]]
        assert not different, (tag, different)
        opened = spotspeed.open_checkpoint(str(path), tag)
        assert (opened.world_size, opened.step) == (ranks, 10)
        newest = spotspeed.list_checkpoints(str(path))[0]
        assert newest.tag == tag, "the next launch resumes this one"


def tensors(path: Path, tag: str | None) -> dict[tuple[str, str], tuple[str, bytes]]:
    """Type and shape, and bytes, of every tensor of a checkpoint."""
    opened = spotspeed.open_checkpoint(str(path), tag)
    found = {}
    for name in opened.parameters():
        for kind in opened.kinds(name):
            values = np.ascontiguousarray(opened.read(name, kind))
            found[name, kind] = (f"{values.dtype}{values.shape}", values.tobytes())
    return found
