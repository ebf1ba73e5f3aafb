"""Real DeepSpeed engines on real ranks: what a provider captures is whole, and resumes exactly."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.ranks

DRIVERS = ROOT / "tests" / "distributed" / "drivers"
RANKS = (1, 2, 3)
LIMIT_S = 900.0

FP32 = ("s0-fp32", "z1-fp32", "z2-fp32", "z2-rr", "z2-rr-aligned", "z3-fp32")
BF16 = ("s0-bf16", "z1-bf16", "bf16opt", "z2-bf16", "z2-host", "z3-bf16", "z3-host")
OTHERS = (
    "s0-sgd", "s0-adagrad", "s0-fp16", "z2-fp16", "z2-amsgrad", "z2-sgd", "z2-adagrad", "z3-fp16",
    "z3-sgd", "z3-adagrad", "z2-master16", "z3-master16", "s0-small", "z2-small", "z3-small",
)  # fmt: skip
SMALL = ("z2-small", "z3-small")
"""BatchNorm, schedules, a scale in motion and accumulation, from every number of ranks to every."""
WITH_OPERATORS = {"s0-fused": "fused_adam", "z2-cpuadam": "cpu_adam", "z3-cpuadam": "cpu_adam"}
"""Cases that need an operator of DeepSpeed which takes minutes to build; run where it is built."""
EVERYWHERE = ("s0-fp32", "s0-bf16", "bf16opt", "z2-rr-aligned", "z2-sgd", "z3-bf16", "z3-adagrad",
              *SMALL)  # fmt: skip
"""Cases that resume from every number of ranks to every other."""
DROPPED = [
    [2, case, case, "middle", kind]
    for case in ("s0-fp32", "z2-bf16", "z3-bf16") for kind in ("exp_avg", "step")
]  # fmt: skip
REFUSED = {
    ("z2-bf16", "z2-sgd"): "InvalidLayoutError: the checkpoint's optimizer state is not that of",
    ("z2-amsgrad", "z2-bf16"): "stored exp_avg, exp_avg_sq, max_exp_avg_sq, step, expected exp_avg",
    ("z2-bf16", "z2-amsgrad"): "expected exp_avg, exp_avg_sq, max_exp_avg_sq, step",
    ("z2-bf16", "z2-fp16"): "UnsupportedLayoutError: weight:frozen.weight: stored as bfloat16",
}


def _is_built(operator: str) -> bool:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", ROOT / ".torch_extensions"))
    return (root / operator / f"{operator}.so").exists()


BUILT = tuple(case for case, operator in WITH_OPERATORS.items() if _is_built(operator))
CASES = (*FP32, *BF16, *OTHERS, *BUILT)
EACH = [(case, ranks) for ranks in RANKS for case in CASES]
IN_FULL = {(case, ranks) for case, ranks in EACH if ranks != 2 and case not in EVERYWHERE}
"""What only `make test-full` records and resumes: every case runs on two ranks in any case."""
TO_OTHER_RANKS = [
    (after, [before, case, case, "middle", "fresh"])
    for before in RANKS for after in RANKS for case in EVERYWHERE if before != after
]  # fmt: skip
TO_OTHER_STAGES = [
    [2, before, after, "middle", "fresh"]
    for family in (FP32, BF16)
    for before, after in zip(family, (*family[1:], family[0]), strict=True)
] + [[2, before, after, "middle", "fresh"] for before, after in (
    ("z2-adagrad", "s0-adagrad"), ("z2-adagrad", "z3-adagrad"), ("z2-sgd", "z3-sgd"),
    ("z2-fp16", "z3-fp16"), ("z2-bf16", "z3-fp32"), ("z2-rr-aligned", "s0-fp32"),
)] + [[2, "z2-bf16", after, "middle", "fresh"] for after in BUILT] + [
    [2, before, "z3-bf16", "middle", "fresh"] for before in BUILT
]  # fmt: skip
TO_THE_BEGINNING = [
    [2, case, case, "start", "used"]
    for case in (*EVERYWHERE, "s0-adagrad", "z2-bf16", "z1-bf16")
    if case not in SMALL
]
STAGES_ON = 3
"""Number of ranks on which other stages resume what two ranks wrote."""


def _on_ranks(*cases: str) -> list[Any]:
    """Test parameters: each of the cases on each number of ranks."""
    return [
        pytest.param(case, ranks, id=f"{case}-{ranks}",
                     marks=[pytest.mark.full] if (case, ranks) in IN_FULL else [])
        for case, ranks in EACH if case in cases
    ]  # fmt: skip


def _pairs(cases: list[str], ranks: int) -> list[list[Any]]:
    """What is resumed on so many ranks, each once."""
    wanted = [[ranks, case, case, "middle", "fresh"] for case in cases]
    wanted += [pair for pair in TO_THE_BEGINNING if pair[0] == ranks]
    wanted += [pair for after, pair in TO_OTHER_RANKS if after == ranks]
    wanted += TO_OTHER_STAGES if ranks == STAGES_ON else []
    if ranks == 2:
        wanted += DROPPED + [[2, *pair, "middle", "fresh"] for pair in REFUSED]
    return list(map(list, dict.fromkeys(map(tuple, wanted))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def unpickling() -> Iterator[None]:
    """The drivers' own classes, for reading the files that they wrote."""
    sys.path.insert(0, str(DRIVERS))
    yield
    sys.path.remove(str(DRIVERS))


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest) -> dict[int, list[str]]:
    """The cases of this run, by number of ranks."""
    is_full = any(item.get_closest_marker("full") is not None and item.path == request.path
                  for item in request.session.items)  # fmt: skip
    return {
        ranks: [case for case in CASES if is_full or (case, ranks) not in IN_FULL]
        for ranks in RANKS
    }


@pytest.fixture(scope="module")
def recorded(folder: Path, unpickling: None, cases: dict[int, list[str]]) -> dict[int, Any]:
    for ranks in RANKS:
        run_ranks(ranks, DRIVERS / "state_record.py", str(folder), ",".join(cases[ranks]),
                  timeout_s=LIMIT_S)  # fmt: skip
    return {ranks: torch.load(folder / f"w{ranks}.pt", weights_only=False) for ranks in RANKS}


@pytest.fixture(scope="module")
def resumed(folder: Path, recorded: dict[int, Any], cases: dict[int, list[str]]) -> dict[int, Any]:
    results = {}
    for ranks in RANKS:
        pairs, out = folder / f"pairs{ranks}.json", folder / f"resumed{ranks}.pt"
        pairs.write_text(json.dumps(_pairs(cases[ranks], ranks)))
        run_ranks(ranks, DRIVERS / "state_resume.py", str(folder), str(pairs), str(out),
                  timeout_s=LIMIT_S)  # fmt: skip
        results[ranks] = torch.load(out, weights_only=False)
    return results


def _differences(before: Any, after: Any) -> list[str]:
    """Tensors that are not equal, bit for bit, after exact conversion to one dtype."""
    names = sorted({*before.tensors, *after.tensors})
    faults = []
    for key in names:
        first, second = before.tensors.get(key), after.tensors.get(key)
        if first is None or second is None:
            faults.append(f"{key}: only {'after' if first is None else 'before'}")
        elif not torch.equal(first.double(), second.double()):
            faults.append(f"{key}: {(first.double() - second.double()).abs().max():.3g} apart")
    return faults


@pytest.mark.parametrize(("case", "ranks"), _on_ranks(*CASES))
def test_all_ranks_together_write_each_tensor_exactly_once(
    recorded: dict[int, Any], case: str, ranks: int
) -> None:
    result = recorded[ranks][case]
    for moment in ("start", "middle", "end"):
        assert result[moment].faults == []
    trained = {name for name, facts in result["describe"]["parameters"].items() if facts["trained"]}
    stored = {key[5:] for key in result["middle"].tensors if key.startswith("fp32:")}
    assert stored == trained == {
        "token.weight", "first.weight", "first.bias", "second.weight", "second.bias", "child.gain",
        "one", "unused",
    }  # fmt: skip
    assert {"weight:frozen.weight", "weight:frozen.bias"} <= set(result["middle"].tensors)


@pytest.mark.parametrize(("case", "ranks"), _on_ranks(*CASES))
def test_captured_values_are_those_that_deepspeed_holds(
    recorded: dict[int, Any], resumed: dict[int, Any], case: str, ranks: int
) -> None:
    """Every one of them, found in DeepSpeed's memory without a provider, also after a resume."""
    for found in (recorded[ranks][case], resumed[ranks][ranks, case, case, "middle", "fresh"]):
        compared, faults = found["independent"]
        assert faults == []
        tensors = found.get("middle", found.get("restored")).tensors
        assert compared == sum("@" not in key for key in tensors) >= 10


@pytest.mark.parametrize(("case", "ranks"), _on_ranks(*FP32))
def test_captured_values_are_those_of_one_process_without_zero(
    recorded: dict[int, Any], case: str, ranks: int
) -> None:
    """Round-robin partitions too, where DeepSpeed's accessors are wrong."""
    plain = recorded[1]["s0-fp32"]["middle"].tensors
    for key, values in recorded[ranks][case]["middle"].tensors.items():
        torch.testing.assert_close(values, plain[key], rtol=1e-4, atol=1e-7, msg=key)


@pytest.mark.parametrize(("case", "ranks"), _on_ranks(*CASES))
def test_a_resume_on_as_many_ranks_continues_bit_for_bit(
    recorded: dict[int, Any], resumed: dict[int, Any], case: str, ranks: int
) -> None:
    before, after = recorded[ranks][case], resumed[ranks][ranks, case, case, "middle", "fresh"]
    assert _differences(before["middle"], after["restored"]) == []
    assert after["losses"] == before["losses"][3:]
    assert _differences(before["end"], after["end"]) == []


@pytest.mark.parametrize(
    ("after", "pair"), TO_OTHER_RANKS, ids=lambda item: "-".join(map(str, item[:2]))
    if isinstance(item, list) else str(item),
)  # fmt: skip
def test_a_resume_on_another_number_of_ranks_keeps_every_bit_of_the_state(
    recorded: dict[int, Any], resumed: dict[int, Any], after: int, pair: list[Any]
) -> None:
    before, result = recorded[pair[0]][pair[1]], resumed[after][tuple(pair)]
    assert _differences(before["middle"], result["restored"]) == result["independent"][1] == []
    assert result["losses"] == pytest.approx(before["losses"][3:], abs=2e-2)


@pytest.mark.parametrize("pair", TO_OTHER_STAGES, ids=lambda pair: f"{pair[1]}-to-{pair[2]}")
def test_a_resume_in_another_stage_keeps_every_bit_of_the_state(
    recorded: dict[int, Any], resumed: dict[int, Any], pair: list[Any]
) -> None:
    before, after = recorded[2][pair[1]], resumed[STAGES_ON][tuple(pair)]
    assert _differences(before["middle"], after["restored"]) == after["independent"][1] == []
    assert after["losses"] == pytest.approx(before["losses"][3:], abs=2e-2)


@pytest.mark.parametrize("pair", TO_THE_BEGINNING, ids=lambda pair: f"{pair[1]}-on-{pair[0]}")
def test_a_state_of_step_0_leaves_a_used_engine_as_if_never_stepped(
    recorded: dict[int, Any], resumed: dict[int, Any], pair: list[Any]
) -> None:
    before, after = recorded[pair[0]][pair[1]], resumed[pair[0]][tuple(pair)]
    assert _differences(before["start"], after["restored"]) == []
    assert after["losses"] == before["losses"][:3]
    assert _differences(before["middle"], after["end"]) == []


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("before", RANKS)
@pytest.mark.parametrize("after", RANKS)
def test_rates_counts_scale_schedule_and_buffers_come_back(
    recorded: dict[int, Any], resumed: dict[int, Any], before: int, after: int, case: str
) -> None:
    wrote = recorded[before][case]
    found = resumed[after][before, case, case, "middle", "fresh"]
    expected = dict(wrote["set"])
    assert expected["counts"] == (3, 72, 2), "the case is meant to skip steps"
    expected["buffers"] = [expected["buffers"][rank % before] for rank in range(after)]
    assert found["set"] == expected and expected["scale"]["cur_scale"] < 2**17
    if before == after:
        assert found["set_at_end"] == wrote["set_at_end"]


@pytest.mark.parametrize("pair", DROPPED, ids=lambda pair: f"{pair[1]}-without-{pair[4]}")
def test_a_resume_without_one_kind_of_state_differs_at_the_second_step(
    recorded: dict[int, Any], resumed: dict[int, Any], pair: list[Any]
) -> None:
    """The comparisons above can fail: the first loss hides what the optimizer has lost."""
    before, after = recorded[2][pair[1]], resumed[2][tuple(pair)]
    assert after["losses"][0] == before["losses"][3]
    assert after["losses"][1] != before["losses"][4]
    assert _differences(before["end"], after["end"]) != []


@pytest.mark.parametrize("pair", REFUSED, ids="-to-".join)
def test_a_state_that_does_not_fit_is_refused_by_name(
    resumed: dict[int, Any], pair: tuple[str, str]
) -> None:
    assert REFUSED[pair] in resumed[2][2, *pair, "middle", "fresh"]["error"]


def test_groups_and_aliases_are_given_by_name(recorded: dict[int, Any]) -> None:
    for ranks in RANKS:
        for case in set(FP32 + BF16) & set(recorded[ranks]):
            model = recorded[ranks][case]["describe"]
            groups = [{name for name in group if not name.startswith("frozen.")
                       and name != "child.empty"} for group in model["groups"]]  # fmt: skip
            assert groups == [
                {"token.weight", "first.weight", "second.weight"},
                {"first.bias", "second.bias", "child.gain", "unused"},
                {"one"},
            ]
            assert model["aliases"] == {"head.weight": "token.weight"}
            assert model["parameters"]["token.weight"]["shape"] == [7, 6]


@pytest.mark.parametrize("case", WITH_OPERATORS)
def test_cases_that_need_an_operator_run_where_it_is_built(case: str) -> None:
    if case not in BUILT:
        pytest.skip(f"DeepSpeed's {WITH_OPERATORS[case]} is not built on this machine")
    assert case in CASES
