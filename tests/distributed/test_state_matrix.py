"""The full matrix: every layout written on 1 to 4 ranks and read on 1 to 4 ranks, bit for bit."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import ROOT, run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.full]

DRIVERS = ROOT / "tests" / "distributed" / "drivers"
RANKS = (1, 2, 3, 4)
LIMIT_S = 1800.0
OPERATORS = {
    "s0-fused": "fused_adam", "z1-cpuadam": "cpu_adam", "z2-cpuadam": "cpu_adam",
    "z3-cpuadam": "cpu_adam", "z3-host-cpuadam": "cpu_adam", "z2-cpulion": "cpu_lion",
    "z3-cpulion": "cpu_lion", "z2-cpuadagrad": "cpu_adagrad", "z3-cpuadagrad": "cpu_adagrad",
}  # fmt: skip
"""Cases that need an operator of DeepSpeed which takes minutes to build; run where it is built."""
PLAIN = (
    "s0-fp32", "s0-sgd", "s0-adagrad", "s0-bf16", "s0-fp16", "z1-fp32", "z1-bf16", "z1-host",
    "z1-rr", "bf16opt", "z2-fp32", "z2-bf16", "z2-fp16", "z2-rr", "z2-rr-aligned", "z2-amsgrad",
    "z2-sgd", "z2-adagrad", "z2-host", "z2-host-rr", "z2-lora", "z2-master16", "z3-fp32",
    "z3-bf16", "z3-fp16", "z3-sgd", "z3-adagrad", "z3-host", "z3-lora", "z3-master16",
    "z3-hpz", "s0-plain-sgd", "s0-small", "z2-small", "z3-small",
)  # fmt: skip
MUON = ("s0-muon", "z1-muon", "muon-bf16opt", "z2-muon", "z2-muon-fp32", "z2-muon-rr",
        "z2-muon-host", "z3-muon", "z3-muon-host")  # fmt: skip
FAMILIES = {
    "fp32": ("s0-fp32", "z1-fp32", "z2-fp32", "z2-rr", "z2-rr-aligned", "z3-fp32",
             "z2-host-rr"),
    "bf16": ("s0-bf16", "z1-bf16", "z1-rr", "bf16opt", "z2-bf16", "z1-host", "z2-host", "z3-bf16",
             "z3-host", "z3-hpz"),
    "fp16": ("s0-fp16", "z2-fp16", "z3-fp16"),
    "sgd": ("s0-sgd", "z2-sgd", "z3-sgd"),
    "adagrad": ("s0-adagrad", "z2-adagrad", "z3-adagrad"),
    "muon": ("z1-muon", "z2-muon", "z2-muon-rr", "z3-muon"),
    "muon into fp32": ("z2-muon-fp32", "s0-muon"),
}  # fmt: skip
"""Layouts that store the same tensors: each resumes what every other wrote."""
INTO_FEWER_BITS = {("s0-sgd", "z2-sgd"), ("s0-sgd", "z3-sgd"), ("s0-adagrad", "z2-adagrad"),
                   ("s0-adagrad", "z3-adagrad")}  # fmt: skip
"""(writes, reads) where frozen weights of fp32 would have to become bf16."""
FIRST_IS_WIDER = {("z1-muon", "muon-bf16opt"), ("z2-muon", "muon-bf16opt")}
"""(writes, reads) where the reader keeps in fp32 what the writer kept in bf16."""


def _is_built(operator: str) -> bool:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", ROOT / ".torch_extensions"))
    return (root / operator / f"{operator}.so").exists()


CASES = (*PLAIN, *MUON, *(case for case, needed in OPERATORS.items() if _is_built(needed)))
SAME_CASE = [(before, after, case, case)
             for case in CASES for before in RANKS for after in RANKS]  # fmt: skip
OTHER_CASE = sorted({
    (before, (before + index) % 4 + 1, source, target)
    for family in FAMILIES.values()
    for index, source in enumerate(family) for target in family if source != target
    for before in ((index % 3) + 1, 4)
} | {(2, 3, *pair) for pair in FIRST_IS_WIDER})  # fmt: skip


@pytest.fixture(scope="module")
def unpickling() -> Iterator[None]:
    """The drivers' own classes, for reading the files that they wrote."""
    sys.path.insert(0, str(DRIVERS))
    yield
    sys.path.remove(str(DRIVERS))


class Runs:
    """One launch a number of ranks writes all cases; one more reads what all launches wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.recorded = cache(self._record)
        self.resumed = cache(self._resume)

    def _record(self, ranks: int) -> Any:
        self._run(ranks, "state_record.py", str(self._folder), ",".join(CASES))
        return torch.load(self._folder / f"w{ranks}.pt", weights_only=False)

    def _resume(self, after: int) -> Any:
        for ranks in RANKS:
            self.recorded(ranks)
        pairs = [[key[0], *key[2:], "middle", "fresh"]
                 for key in (*SAME_CASE, *OTHER_CASE) if key[1] == after]  # fmt: skip
        wanted, out = self._folder / f"pairs{after}.json", self._folder / f"resumed{after}.pt"
        wanted.write_text(json.dumps(pairs))
        self._run(after, "state_resume.py", str(self._folder), str(wanted), str(out))
        return torch.load(out, weights_only=False)

    def _run(self, ranks: int, driver: str, *words: str) -> None:
        # Muon's compiled kernels are not the same from one engine to the next.
        run_ranks(ranks, DRIVERS / driver, *words, timeout_s=LIMIT_S,
                  env={"TORCHDYNAMO_DISABLE": "1"})  # fmt: skip

    def pair(self, before: int, after: int, source: str, target: str) -> tuple[Any, Any]:
        """What `source` wrote on `before` ranks, and what `target` made of it on `after`."""
        key = (before, source, target, "middle", "fresh")
        return self.recorded(before)[source], self.resumed(after)[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, unpickling: None) -> Runs:
    return Runs(tmp_path_factory.mktemp("matrix"))


def _assert_same(before: Any, after: Any) -> None:
    assert sorted(before.tensors) == sorted(after.tensors)
    assert [key for key, values in before.tensors.items()
            if not torch.equal(values.double(), after.tensors[key].double())] == []  # fmt: skip
    assert before.faults == after.faults == []


@pytest.mark.parametrize("key", SAME_CASE, ids=lambda key: f"{key[2]}-{key[0]}-to-{key[1]}")
def test_a_state_is_read_on_any_number_of_ranks(runs: Runs, key: tuple[int, int, str, str]) -> None:
    before, after = runs.pair(*key)
    _assert_same(before["middle"], after["restored"])
    assert before["independent"][1] == after["independent"][1] == []
    assert len(after["losses"]) == 3
    if (kept := before.get("set")) is not None:
        own = [kept["buffers"][rank % key[0]] for rank in range(key[1])]
        assert after["set"] == {**kept, "buffers": own}
    if key[0] == key[1]:
        assert after["losses"] == before["losses"][3:]
        _assert_same(before["end"], after["end"])
    else:
        assert after["losses"] == pytest.approx(before["losses"][3:], abs=5e-2)


@pytest.mark.parametrize("key", OTHER_CASE, ids=lambda key: "-".join(map(str, key)))
def test_a_state_is_read_by_every_layout_that_keeps_the_same_tensors_exactly(
    runs: Runs, key: tuple[int, int, str, str]
) -> None:
    before, after = runs.pair(*key)
    if key[2:] in INTO_FEWER_BITS:
        assert after["error"].startswith(
            "UnsupportedLayoutError: weight:frozen.weight: stored as float32, here bfloat16"
        )
        return
    _assert_same(before["middle"], after["restored"])
    assert after["independent"][1] == []
    assert after["losses"] == pytest.approx(before["losses"][3:], abs=5e-2)


def test_every_frozen_weight_of_a_model_that_is_99_percent_frozen_is_stored_once(
    runs: Runs,
) -> None:
    for ranks in RANKS:
        for case in ("z2-lora", "z3-lora"):
            state = runs.recorded(ranks)[case]["middle"]
            frozen = sum(values.numel() for key, values in state.tensors.items()
                         if key.startswith("weight:"))  # fmt: skip
            trained = sum(values.numel() for key, values in state.tensors.items()
                          if key.startswith("fp32:"))  # fmt: skip
            assert state.faults == [] and frozen > 99 * trained


@pytest.mark.parametrize("operator", sorted(set(OPERATORS.values())))
def test_cases_that_need_an_operator_run_where_it_is_built(operator: str) -> None:
    if not _is_built(operator):
        pytest.skip(f"DeepSpeed's {operator} is not built on this machine")
    assert set(OPERATORS) & set(CASES)
