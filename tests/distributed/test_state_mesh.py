"""Divided models on real ranks: saved, and resumed on other numbers of replicas, exactly."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.ranks

DRIVERS = ROOT / "tests" / "distributed" / "drivers"
LIMIT_S = 900.0
RANKS = (2, 4)
CASES = {
    "pipe": ("pipe-0", "pipe-0-bf16", "pipe-1", "pipe-1-bf16", "pipe-1-bf16opt", "pipe-1-fp16"),
    "moe": ("moe-0", "moe-0-bf16", "moe-1", "moe-2", "moe-2-bf16"),
}
if importlib.util.find_spec("transformers") is not None:
    CASES["tensor"] = ("tensor-0", "tensor-1-bf16", "tensor-1-bf16opt", "tensor-2")
ALL = [case for cases in CASES.values() for case in cases]
TO_OTHER_STAGES = [
    (2, "pipe-1", "pipe-0"), (2, "pipe-0-bf16", "pipe-1-bf16"),
    (4, "pipe-1-bf16opt", "pipe-0-bf16"), (4, "pipe-1-bf16", "pipe-1-bf16opt"),
    (2, "moe-2", "moe-0"), (4, "moe-0", "moe-1"), (4, "moe-0-bf16", "moe-2-bf16"),
]  # fmt: skip
if "tensor" in CASES:
    TO_OTHER_STAGES += [(2, "tensor-2", "tensor-0"), (4, "tensor-1-bf16", "tensor-1-bf16opt")]
"""(ranks that wrote, case that wrote, case that reads); read on the other number of ranks."""
REFUSED = {
    (2, 2, "pipe-1", "pipe-of-1"): ("pipeline parallelism 2", "has no pipeline"),
    (2, 4, "pipe-1", "pipe-of-4"): ("pipeline parallelism 2", "has pipeline parallelism 4"),
    (2, 2, "moe-2", "moe-of-1"): ("expert parallelism 2", "has no pipeline and no expert"),
    (2, 4, "moe-2", "moe-of-4"): ("expert parallelism 2", "has expert parallelism 4"),
}
"""By (ranks that wrote, ranks that read, case that wrote, case that reads)."""


@pytest.fixture(scope="module")
def unpickling() -> Iterator[None]:
    """The drivers' own classes, for reading the files that they wrote."""
    sys.path.insert(0, str(DRIVERS))
    yield
    sys.path.remove(str(DRIVERS))


def _run(mode: str, folder: Path, ranks: int, wanted: list[Any]) -> Any:
    run_ranks(ranks, DRIVERS / "mesh_state.py", mode, str(folder), json.dumps(wanted),
              timeout_s=LIMIT_S)  # fmt: skip
    return torch.load(folder / f"{mode}-w{ranks}.pt", weights_only=False)


class Runs:
    """What was recorded and resumed; each family in processes of its own, when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._recorded: dict[str, dict[tuple[int, str], Any]] = {}
        self._resumed: dict[str, dict[tuple[int, int, str, str], Any]] = {}

    def path(self, ranks: int, case: str) -> str:
        """Where `case` was saved on so many ranks."""
        self.recorded(ranks, case)
        return str(self._folder / f"{case}-w{ranks}")

    def recorded(self, ranks: int, case: str) -> Any:
        """What `case` wrote on so many ranks."""
        family = case.partition("-")[0]
        if family not in self._recorded:
            self._recorded[family] = {
                (number, name): result
                for number in RANKS
                for name, result in self._record(family, number).items()
            }
        return self._recorded[family][ranks, case]

    def _record(self, family: str, ranks: int) -> Any:
        return _run("record", self._folder, ranks, list(CASES[family]))

    def resumed(self, before: int, after: int, source: str, target: str) -> Any:
        """What `source`, written by `before` ranks, became as `target` on `after` ranks."""
        family = source.partition("-")[0]
        if family not in self._resumed:
            self.recorded(2, CASES[family][0])
            found: dict[tuple[int, int, str, str], Any] = {}
            for ranks in RANKS:
                results = _run("resume", self._folder, ranks, _pairs(family, ranks))
                found |= {(key[0], ranks, *key[1:]): result for key, result in results.items()}
            self._resumed[family] = found
        return self._resumed[family][before, after, source, target]


def _pairs(family: str, after: int) -> list[tuple[int, str, str]]:
    """What is resumed on `after` ranks."""
    pairs = [(before, case, case) for before in RANKS for case in CASES[family]]
    pairs += [pair for pair in TO_OTHER_STAGES if pair[0] != after]
    pairs += [(key[0], *key[2:]) for key in REFUSED if key[1] == after]
    return [pair for pair in pairs if pair[1].startswith(family)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, unpickling: None) -> Runs:
    return Runs(tmp_path_factory.mktemp("meshes"))


def _assert_same_tensors(before: Any, after: Any) -> None:
    first, second = before["state"].tensors, after["state"].tensors
    assert sorted(first) == sorted(second)
    assert [key for key, values in first.items()
            if not torch.equal(values.double(), second[key].double())] == []  # fmt: skip
    assert before["faults"] == after["faults"] == []


def _assert_same_rank(before: dict[str, Any], after: dict[str, Any]) -> None:
    """What a rank has beside its tensors: groups, counts, loss scale, schedule, buffers."""
    for part in ("groups", "counts", "scale", "schedule"):
        assert before[part] == after[part], part
    assert sorted(before["buffers"]) == sorted(after["buffers"]) != []
    for name, values in before["buffers"].items():
        assert torch.equal(values, after["buffers"][name]), name


def _assert_continues(before: Any, after: Any) -> None:
    _assert_same_tensors(before["middle"], after["restored"])
    assert after["losses"] == before["losses"][3:]
    _assert_same_tensors(before["end"], after["end"])
    for moment, other in (("middle", "restored"), ("end", "end")):
        for rank, own in enumerate(before[moment]["ranks"]):
            _assert_same_rank(own, after[other]["ranks"][rank])


def _old_rank(case: str, rank: int, before: int, after: int) -> int:
    """The rank that had the same stage or the same experts, in DeepSpeed's own order of ranks."""
    old, new = before // 2, after // 2
    if case.startswith("pipe"):
        return rank // new * old + rank % new % old
    return rank // 2 % old * 2 + rank % 2


@pytest.mark.full
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", ALL)
def test_a_divided_model_resumed_on_as_many_ranks_continues_bit_for_bit(
    runs: Runs, case: str, ranks: int
) -> None:
    _assert_continues(runs.recorded(ranks, case), runs.resumed(ranks, ranks, case, case))


@pytest.mark.full
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
@pytest.mark.parametrize("case", ALL)
def test_a_divided_model_resumed_on_another_number_of_replicas_keeps_every_bit(
    runs: Runs, case: str, before: int, after: int
) -> None:
    old, new = runs.recorded(before, case), runs.resumed(before, after, case, case)
    _assert_same_tensors(old["middle"], new["restored"])
    for rank, own in enumerate(new["restored"]["ranks"]):
        source = old["middle"]["ranks"][_old_rank(case, rank, before, after)]
        _assert_same_rank(source, own)
    assert len(new["losses"]) == 3 and all(map(math.isfinite, new["losses"]))
    assert new["end"]["faults"] == []


@pytest.mark.full
@pytest.mark.parametrize("pair", TO_OTHER_STAGES, ids=lambda pair: f"{pair[1]}-to-{pair[2]}")
def test_a_divided_model_resumed_in_another_stage_keeps_every_bit(
    runs: Runs, pair: tuple[int, str, str]
) -> None:
    result = runs.resumed(pair[0], 6 - pair[0], *pair[1:])
    _assert_same_tensors(runs.recorded(pair[0], pair[1])["middle"], result["restored"])
    assert len(result["losses"]) == 3 and result["end"]["faults"] == []


@pytest.mark.full
@pytest.mark.parametrize("key", REFUSED, ids=lambda key: f"{key[2]}-to-{key[3]}")
def test_another_degree_is_refused_naming_both(runs: Runs, key: tuple[int, int, str, str]) -> None:
    stored, live = REFUSED[key]
    error = runs.resumed(*key)["error"]
    assert error.startswith("InvalidLayoutError") and live in error
    assert f"the checkpoint was written with {stored}" in error


@pytest.mark.full
@pytest.mark.skipif("tensor" not in CASES, reason="needs transformers: pip install transformers")
@pytest.mark.parametrize(("after", "target", "live"), [
    (2, "tensor-of-1", "has no pipeline"), (4, "tensor-of-4", "has tensor parallelism 4"),
])  # fmt: skip
def test_another_degree_of_autotp_is_refused_naming_both(
    runs: Runs, tmp_path: Path, after: int, target: str, live: str
) -> None:
    """In a launch of its own: DeepSpeed's groups of a process have one degree for ever."""
    saved = Path(runs.path(2, "tensor-2"))
    shutil.copytree(saved, tmp_path / saved.name)
    key = (2, "tensor-2", target)
    error = _run("resume", tmp_path, after, [key])[key]["error"]
    assert error.startswith("InvalidLayoutError") and live in error
    assert "the checkpoint was written with tensor parallelism 2" in error


@pytest.mark.full
def test_the_description_of_a_divided_model_has_all_of_its_parameters(runs: Runs) -> None:
    pipe, moe = (runs.recorded(4, case)["describe"] for case in ("pipe-1", "moe-2"))
    assert {"1.linear.weight", "3.linear.weight", "tied_modules.embed.weight",
            "4.gain"} <= set(pipe["parameters"])  # fmt: skip
    experts = {
        int(name.split("deepspeed_experts.")[1].split(".")[0])
        for name in moe["parameters"]
        if name.startswith("moes.0.") and "experts" in name
    }
    assert experts == {0, 1, 2, 3}
    assert pipe["mesh"]["degrees"] == {"pipeline": "2"}
    assert moe["mesh"]["degrees"] == {"expert": "2"}


@pytest.mark.full
def test_some_steps_of_fp16_overflow_before_the_save(runs: Runs) -> None:
    for ranks in RANKS:
        _, _, skipped = runs.recorded(ranks, "pipe-1-fp16")["middle"]["ranks"][0]["counts"]
        assert 0 < skipped < 3


def test_a_pipeline_resumes_bit_for_bit_and_is_refused_by_all_ranks_or_none(
    tmp_path: Path, unpickling: None
) -> None:
    before = _run("record", tmp_path, 2, ["pipe-1"])["pipe-1"]
    targets = ("pipe-1", "pipe-of-1", "1@pipe-1")
    results = _run("resume", tmp_path, 2, [(2, "pipe-1", target) for target in targets])
    _assert_continues(before, results[2, "pipe-1", "pipe-1"])
    assert "pipeline parallelism 2" in results[2, "pipe-1", "pipe-of-1"]["error"]
    refused = results[2, "pipe-1", "1@pipe-1"]["error"]
    assert refused.startswith("UnsupportedLayoutError: rank 1: "), "rank 0 does not wait for it"


@pytest.mark.full
def test_the_weights_of_all_stages_are_exported_together(runs: Runs, tmp_path: Path) -> None:
    before = runs.recorded(2, "pipe-1")["middle"]
    file = tmp_path / "weights.safetensors"
    words = ["export", runs.path(2, "pipe-1"), "middle", "--to", "safetensors", str(file)]
    subprocess.run([sys.executable, "-m", "spotspeed", *words], check=True, cwd=ROOT)
    found = load_file(file)
    assert torch.equal(found["4.gain"], before["state"].tensors["fp32:4.gain"])
    for own in before["ranks"]:
        for name, values in own["buffers"].items():
            assert torch.equal(found[name], values), name
