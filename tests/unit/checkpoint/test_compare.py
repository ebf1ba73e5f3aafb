"""Two checkpoints are the same or not, bit by bit, whatever numbers of ranks wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import spotspeed.checkpoint.compare as comparing
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.cli import app
from spotspeed.core import plain
from spotspeed.core.layout import TensorKey
from tests.unit.checkpoint.conftest import Tensors, Written, make_tensors, write_checkpoint

JOB = TensorKey("blob", "job")
RANK = TensorKey("blob", "rank", "rank-0")
FP32 = TensorKey("fp32", "layers.0.weight")


def state(**changes: Any) -> Tensors:
    job = {"step": 10, "counters": {"global_steps": 10}, "world_size": 2, **changes}
    return {**make_tensors(), JOB: packed(job), RANK: packed({"rank": 0, "rng": {"torch": b"1"}})}


def packed(value: Any) -> tuple[str, np.ndarray[Any, Any]]:
    return "uint8", np.frombuffer(plain.encode(value, what="x"), np.uint8).copy()


def compared(first: Written, second: Written) -> comparing.Comparison:
    return comparing.compare(*(CheckpointReader(w.storage, w.manifest) for w in (first, second)))


@pytest.mark.parametrize("run_bytes", [64, 1 << 25])
def test_the_same_state_of_other_ranks_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_bytes: int
) -> None:
    monkeypatch.setattr(comparing, "RUN_BYTES", run_bytes)
    found = compared(write_checkpoint(tmp_path / "a", state(), 2),
                     write_checkpoint(tmp_path / "b", state(world_size=3), 3))  # fmt: skip
    assert found.is_same and found.tensors == len(state()) - 1


def test_a_tensor_without_dimensions_that_differs_is_named(tmp_path: Path) -> None:
    changed = state()
    key = TensorKey("step", "layers.0.weight")
    changed[key] = ("float32", np.array(11, np.float32))
    found = compared(write_checkpoint(tmp_path / "a", state(), 2),
                     write_checkpoint(tmp_path / "b", changed, 2))  # fmt: skip
    [difference] = found.differences
    assert difference.what == "step:layers.0.weight"
    assert "1 of 1 elements differ; the first is 0: " in difference.how
    assert "10.0" in difference.how and "11.0" in difference.how


def test_one_bit_is_found_and_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "RUN_BYTES", 256)
    changed = state()
    values = changed[FP32][1].copy()
    values.view(np.uint32).reshape(-1)[[701, 1200]] ^= 1
    changed[FP32] = ("float32", values)
    written = [write_checkpoint(tmp_path / name, tensors, 2)
               for name, tensors in (("a", state()), ("b", changed))]  # fmt: skip
    found = compared(*written)
    assert [item.what for item in found.differences] == ["fp32:layers.0.weight"]
    assert "2 of 1320 elements differ; the first is 701" in found.differences[0].how
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert done.exit_code == 1 and "fp32:layers.0.weight: 2 of" in done.output
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "a"), "--json"])
    assert done.exit_code == 0 and '"is_same": true' in done.output


def test_minus_zero_is_not_zero(tmp_path: Path) -> None:
    key = TensorKey("fp32", "x")
    first, second = (write_checkpoint(tmp_path / name, {**state(), key: ("float32", value)}, 1)
                     for name, value in (("a", np.zeros(3, np.float32)),
                                         ("b", -np.zeros(3, np.float32))))  # fmt: skip
    assert "3 of 3 elements differ" in compared(first, second).differences[0].how


def test_what_is_missing_or_shaped_otherwise_is_named(tmp_path: Path) -> None:
    changed = state(counters={"global_steps": 11})
    del changed[TensorKey("exp_avg", "norm.scale")]
    changed[FP32] = ("float32", changed[FP32][1].T.copy())
    changed[RANK] = packed({"rank": 0, "rng": {"torch": b"2"}})
    found = compared(write_checkpoint(tmp_path / "a", state(), 2),
                     write_checkpoint(tmp_path / "b", changed, 2))  # fmt: skip
    assert {item.what: item.how.partition(" in the")[0] for item in found.differences} == {
        "blob:rank@rank-0": "differs in rng", "exp_avg:norm.scale": "only",
        "fp32:layers.0.weight": "float32[33, 40]",
        "job: counters": "{'global_steps': 10}",
    }  # fmt: skip
