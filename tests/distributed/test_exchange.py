"""DeepSpeed's own checkpoints: exported ones are loaded by DeepSpeed, its own are imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import spotspeed
from spotspeed.cli import app
from tests.ranks import ROOT, run_ranks

DRIVER = "tests/distributed/drivers/exchange.py"
CASES = ["bf16opt", "z1-bf16", "z2-fp32", "z2-rr", "z2-sgd", "z3-bf16", "z2-dynamic"]
MOVED = {"z2-fp32": ("z3-fp32", 3, 40), "z3-bf16": ("z2-bf16", 2, None),
         "bf16opt": ("z1-bf16", 1, None), "z2-rr": ("z2-rr", 2, None),
         "z2-dynamic": ("z2-dynamic", 2, None)}  # fmt: skip
"""Case on 2 ranks -> case on 3 ranks, its ZeRO stage, its sub_group_size."""
RESTORED = {"z2-fp32": "z3-fp32", "z3-bf16": "z2-bf16", "bf16opt": "z3-bf16", "z1-bf16": "bf16opt",
            "z2-rr": "z2-rr", "z2-sgd": "z3-sgd", "z2-dynamic": "z2-dynamic"}  # fmt: skip
"""Case that DeepSpeed saved on 2 ranks -> case that spotspeed restores on 3."""

pytestmark = pytest.mark.ranks
Results = dict[str, dict[str, Any]]


def command(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def launch(ranks: int, mode: str, out: Path, words: list[str]) -> Results:
    run_ranks(ranks, DRIVER, mode, str(out), ",".join(words), timeout_s=400)
    sys.path.insert(0, str(ROOT / "tests/distributed/drivers"))  # where the Snapshot class is
    try:
        results: Results = torch.load(out / f"{mode}-{ranks}.pt", weights_only=False)
    finally:
        sys.path.pop(0)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exchange")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Results:
    """Every case trained on 2 ranks and saved after 3 steps, by spotspeed and by DeepSpeed."""
    return launch(2, "train", folder, CASES)


def check_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same names with the same bits, and the same place in training."""
    saved, wanted = found["saved"].tensors, expected["saved"].tensors
    assert not found["saved"].faults
    assert saved.keys() == wanted.keys()
    different = [name for name, value in wanted.items() if not same_bits(saved[name], value)]
    assert not different
    for name in ("step", "samples", "lr", "skipped"):
        assert found[name] == expected[name], name


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(
        found.flatten().view(torch.uint8), wanted.flatten().view(torch.uint8)
    )


@pytest.fixture(scope="module")
def loaded(folder: Path, trained: Results) -> Results:
    for case in CASES:
        words = ["--sub-group-size", 40] if case.startswith("z3") else []
        command("export", folder / case / "ours", "exchanged", folder / case / "export-2",
                "--to", "deepspeed", "--ranks", 2, *words)  # fmt: skip
    return launch(2, "load", folder, [f"{case}:{case}/export-2" for case in CASES])


@pytest.mark.parametrize("case", CASES)
def test_deepspeed_loads_an_export_and_trains_as_if_never_stopped(
    case: str, trained: Results, loaded: Results
) -> None:
    found = loaded[f"{case}:{case}/export-2"]
    check_state(found, trained[case])
    assert found["scale"] == trained[case]["scale"]
    assert found["losses"] == trained[case]["losses"]
    end = trained[case]["end"].tensors
    assert all(same_bits(found["end"].tensors[name], value) for name, value in end.items())


@pytest.fixture(scope="module")
def moved(folder: Path, trained: Results) -> Results:
    words = []
    for case, (other, stage, sub_group_size) in MOVED.items():
        options = [] if sub_group_size is None else ["--sub-group-size", sub_group_size]
        command("export", folder / case / "ours", "exchanged", folder / case / "export-3",
                "--to", "deepspeed", "--ranks", 3, "--stage", stage, *options)  # fmt: skip
        words.append(f"{other}:{case}/export-3")
    return launch(3, "load", folder, words)


@pytest.mark.full
@pytest.mark.parametrize("case", MOVED)
def test_deepspeed_loads_an_export_for_other_ranks_and_stages(
    case: str, trained: Results, moved: Results
) -> None:
    found = moved[f"{MOVED[case][0]}:{case}/export-3"]
    check_state(found, trained[case])
    assert found["losses"] == pytest.approx(trained[case]["losses"], rel=2e-2)


@pytest.fixture(scope="module")
def imported(folder: Path, trained: Results) -> Results:
    for case in CASES:
        command("import", folder / case / "theirs", "--to", folder / case / "imported")
        command("verify", folder / case / "imported")
    words = [f"{other}:{case}/imported" for case, other in RESTORED.items()]
    return launch(3, "restore", folder, words)


@pytest.mark.parametrize("case", CASES)
def test_an_import_holds_every_bit_that_was_trained(
    case: str, folder: Path, trained: Results, imported: Results
) -> None:
    checkpoint = spotspeed.open_checkpoint(str(folder / case / "imported"), "t")
    wanted = trained[case]["saved"].tensors
    stored = {str(key): key for key in checkpoint.reader.tensors() if key.kind != "blob"}
    assert stored.keys() == wanted.keys()
    for name, key in stored.items():
        data = torch.from_numpy(checkpoint.reader.read_tensor(key).copy()).flatten()
        assert same_bits(data.to(wanted[name].dtype), wanted[name]), name


@pytest.mark.parametrize("case", RESTORED)
def test_an_import_is_restored_on_other_ranks_and_stages(
    case: str, trained: Results, imported: Results
) -> None:
    found = imported[f"{RESTORED[case]}:{case}/imported"]
    check_state(found, trained[case])
    assert found["losses"] == pytest.approx(trained[case]["losses"], rel=2e-2)


@pytest.mark.full
def test_with_json_stdout_is_one_document(folder: Path, trained: Results, tmp_path: Path) -> None:
    """DeepSpeed, which logs to stdout, is imported on the way: so in processes of their own."""

    def document(*words: object) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "spotspeed", *(str(word) for word in words), "--json"],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=200,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    case = CASES[0]
    out = tmp_path / "export"
    made = document("export", folder / case / "ours", out, "--to", "deepspeed", "--ranks", 2)
    assert made["made"]["ranks"] == 2 and (out / "latest").exists()
    brought = document("import", out, "--to", tmp_path / "imported")
    assert brought["step"] == made["step"]
    assert (tmp_path / "imported" / brought["directory"] / "manifest.json").exists()
