"""ZeRO-Infinity's optimizer state in files on NVMe: saved while it trains, resumed anywhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import ROOT, run_ranks

DRIVER = ROOT / "tests" / "distributed" / "drivers" / "nvme_state.py"
LIMIT_S = 900.0
CASES = ("nvme", "nvme-pipelined", "nvme-cpuadam", "host")
PAIRS = {
    2: [(2, case, case) for case in CASES] + [(2, "host", "nvme"), (2, "nvme", "host")],
    3: [(2, "nvme", "nvme"), (2, "nvme-pipelined", "nvme"), (2, "nvme", "host")],
    1: [(2, "nvme", "nvme")],
}
"""(ranks that wrote, case that wrote, case that reads), by the ranks that read."""
ALL = [(after, pair) for after, pairs in PAIRS.items() for pair in pairs]


def _is_built() -> bool:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", ROOT / ".torch_extensions"))
    if not all((root / name / f"{name}.so").exists() for name in ("async_io", "cpu_adam")):
        return False
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible())


pytestmark = [
    pytest.mark.ranks,
    pytest.mark.full,
    pytest.mark.skipif(
        not _is_built(), reason="needs DeepSpeed's async_io and cpu_adam, built: libaio-dev"
    ),
]
Results = dict[Any, dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, dict[int, Results]]:
    folder = tmp_path_factory.mktemp("nvme")
    _run("record", 2, folder, CASES)
    resumed = {}
    for after, pairs in PAIRS.items():
        _run("resume", after, folder, pairs)
        resumed[after] = torch.load(folder / f"resume-w{after}.pt", weights_only=False)
    return torch.load(folder / "record-w2.pt", weights_only=False), resumed


def _run(mode: str, ranks: int, folder: Path, wanted: Any) -> None:
    run_ranks(ranks, DRIVER, mode, str(folder), json.dumps(wanted), timeout_s=LIMIT_S)


def _differences(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert sorted(first) == sorted(second) and len(first) == 12
    return [key for key in first if not torch.equal(first[key], second[key])]


@pytest.mark.parametrize("key", ALL, ids=lambda key: f"{key[1][1]}-to-{key[1][2]}-on-{key[0]}")
def test_what_was_saved_from_files_is_resumed_bit_for_bit(
    runs: tuple[Results, dict[int, Results]], key: tuple[int, tuple[int, str, str]]
) -> None:
    recorded, resumed = runs
    after, (before, source, target) = key
    found, expected = resumed[after][before, source, target], recorded[source]
    assert found["swapped"] == (1 if target.startswith("nvme") else 0)
    assert _differences(expected["middle"], found["middle"]) == []
    assert len(found["losses"]) == 3
    if (after, source) == (before, target):
        assert found["losses"] == expected["losses"]
        assert _differences(expected["end"], found["end"]) == []


def test_state_in_files_trains_as_state_in_memory(
    runs: tuple[Results, dict[int, Results]],
) -> None:
    recorded, _ = runs
    for case in ("nvme", "nvme-pipelined"):
        assert recorded[case]["losses"] == recorded["host"]["losses"]
        assert _differences(recorded[case]["end"], recorded["host"]["end"]) == []
