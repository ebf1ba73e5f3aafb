"""engine.save_checkpoint and load_checkpoint where a model is divided, at the same degrees."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.ranks import run_ranks

pytestmark = [pytest.mark.full, pytest.mark.ranks]
DRIVER = "tests/distributed/drivers/mesh_dropin.py"
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="AutoTP needs transformers"
)


def check(ranks: int, folder: Path, *cases: str) -> None:
    output = run_ranks(ranks, DRIVER, str(folder), *cases, timeout_s=400).output
    for rank in range(ranks):
        for case in cases:
            assert f"rank {rank}: {case}: held" in output


def test_experts_are_saved_and_loaded_as_with_deepspeed(tmp_path: Path) -> None:
    check(2, tmp_path, "moe-0", "moe-2-bf16")


def test_a_pipeline_is_saved_and_loaded_as_with_deepspeed(tmp_path: Path) -> None:
    check(2, tmp_path, "pipe-0", "pipe-1-bf16")


@needs_transformers
def test_autotp_is_saved_and_loaded_as_with_deepspeed(tmp_path: Path) -> None:
    check(2, tmp_path, "tensor-2", "tensor-1-bf16")


def test_hpz_is_saved_and_loaded_as_with_deepspeed(tmp_path: Path) -> None:
    check(4, tmp_path, "hpz")


def test_ulysses_is_saved_and_loaded_as_with_deepspeed(tmp_path: Path) -> None:
    check(2, tmp_path, "ulysses")
