"""A checkpoint's weights as a safetensors file, read back by the library itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from typer.testing import CliRunner

import spotspeed.checkpoint.safetensors as writing
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.rounding import round_to
from spotspeed.cli import app
from spotspeed.core import plain
from spotspeed.core.layout import TensorKey
from spotspeed.errors import CorruptionError, FormatError
from spotspeed.storage.local import LocalStorage
from tests.unit.checkpoint.conftest import Written, write_checkpoint


class Small(torch.nn.Module):
    """Tied, frozen and empty parameters, a persistent and a transient buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = torch.nn.Embedding(37, 21)
        self.frozen = torch.nn.Linear(21, 3, dtype=torch.float16)
        self.empty = torch.nn.Parameter(torch.empty(0, 4))
        self.head = torch.nn.Linear(21, 37, bias=False)
        self.head.weight = self.token.weight
        self.register_buffer("mean", torch.randn(5))
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("scratch", torch.randn(4), persistent=False)


def stored(tensor: torch.Tensor) -> tuple[str, np.ndarray[Any, Any]]:
    name = str(tensor.dtype).removeprefix("torch.")
    bits = tensor.detach().view(torch.int16) if name == "bfloat16" else tensor.detach()
    return name, bits.numpy().copy()


def checkpoint_of(
    root: Path, model: Small, dtype: str = "bfloat16", *, changed: torch.Tensor | None = None
) -> Written:
    """`model` as trained in `dtype` by two ranks; `changed` are underived elements from 100 on."""
    trained = {"token.weight": model.token.weight}
    frozen = {"frozen.weight": model.frozen.weight, "frozen.bias": model.frozen.bias}
    tensors = {TensorKey("fp32", name): stored(value) for name, value in trained.items()}
    tensors |= {TensorKey("weight", name): stored(value) for name, value in frozen.items()}
    for name, value in model.named_buffers():
        tensors[TensorKey("buffer", name, "rank-0")] = stored(value)
        tensors[TensorKey("buffer", name, "rank-1")] = stored(value + 1)
    if changed is not None:
        scope = f"elements-100-{100 + changed.numel()}"
        tensors[TensorKey("weight", "token.weight", scope)] = stored(changed)
    described = {
        name: {"shape": list(value.shape), "dtype": "float16" if name in frozen else dtype,
               "trained": name in trained} for name, value in model.named_parameters()
    }  # fmt: skip
    job = {"model": {"parameters": described, "aliases": {"head.weight": "token.weight"},
                     "transient_buffers": ["scratch"]}}  # fmt: skip
    blob = np.frombuffer(plain.encode(job, what="job"), np.uint8).copy()
    tensors[TensorKey("blob", "job")] = ("uint8", blob)
    return write_checkpoint(root, tensors, 2)


def exported(written: Written, out: Path, *words: str) -> dict[str, torch.Tensor]:
    done = CliRunner().invoke(
        app, ["export", str(written.root), "--to", "safetensors", str(out), *words]
    )
    assert done.exit_code == 0, done.output
    return load_file(out)


@pytest.mark.parametrize("run_bytes", [64, 1 << 26])
def test_the_weights_are_the_masters_in_the_models_own_dtypes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_bytes: int
) -> None:
    monkeypatch.setattr(writing, "RUN_BYTES", run_bytes)
    model = Small()
    found = exported(checkpoint_of(tmp_path / "c", model), tmp_path / "m.safetensors")
    expected = {
        "token.weight": model.token.weight.to(torch.bfloat16), "empty": model.empty.bfloat16(),
        "frozen.weight": model.frozen.weight, "frozen.bias": model.frozen.bias,
        "mean": model.mean, "seen": model.seen,
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("word", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.half), ("fp32", torch.float32)]
)
def test_all_weights_can_be_rounded_to_one_dtype(
    tmp_path: Path, word: str, dtype: torch.dtype
) -> None:
    model = Small()
    found = exported(
        checkpoint_of(tmp_path / "c", model), tmp_path / "m.safetensors", "--dtype", word
    )
    assert torch.equal(found["token.weight"], model.token.weight.to(dtype))
    assert torch.equal(found["frozen.bias"], model.frozen.bias.to(dtype))
    assert torch.equal(found["mean"], model.mean.to(dtype))
    assert torch.equal(found["seen"], model.seen)


def test_a_model_with_tied_weights_loads_it_whole(tmp_path: Path) -> None:
    model, other = Small(), Small()
    out = tmp_path / "m.safetensors"
    exported(checkpoint_of(tmp_path / "c", model, "float32"), out)
    assert load_model(other, out) == (set(), [])
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "token.weight"}


def test_elements_that_are_not_the_rounded_master_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "RUN_BYTES", 256)
    model = Small()
    changed = torch.full((77,), 3.0, dtype=torch.bfloat16)
    written = checkpoint_of(tmp_path / "c", model, changed=changed)
    expected = model.token.weight.detach().to(torch.bfloat16).flatten()
    expected[100:177] = changed
    assert torch.equal(exported(written, tmp_path / "a")["token.weight"].flatten(), expected)
    whole = exported(written, tmp_path / "b", "--dtype", "fp32")["token.weight"]
    assert torch.equal(whole, model.token.weight)


def test_a_damaged_checkpoint_leaves_no_file(tmp_path: Path) -> None:
    written = checkpoint_of(tmp_path / "c", Small())
    shard = written.file(written.ticket.shard_path(1))
    data = bytearray(shard.read_bytes())
    data[4096 + 11] ^= 1
    shard.write_bytes(data)
    reader = CheckpointReader(written.storage, written.manifest)
    with pytest.raises(CorruptionError):
        writing.export_safetensors(reader, LocalStorage(tmp_path / "out"), "m.safetensors")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_job_without_a_model_is_named(tmp_path: Path) -> None:
    blob = np.frombuffer(plain.encode({"step": 3}, what="job"), np.uint8).copy()
    written = write_checkpoint(tmp_path, {TensorKey("blob", "job"): ("uint8", blob)}, 1)
    with pytest.raises(FormatError, match="description of its model"):
        writing.export_safetensors(
            CheckpointReader(written.storage, written.manifest), written.storage, "m"
        )


def test_rounding_is_torchs() -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 65519.9, 65520.0, 1e-8, 3.4e38])
    values = torch.cat([bits.view(torch.float32), edges])
    values = values[~values.isnan()]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        rounded = bytes(round_to(values.numpy().tobytes(), "float32", name))
        assert rounded == values.to(dtype).view(torch.uint8).numpy().tobytes()
    quiet = bytes(round_to(np.full(3, np.nan, "<f4").tobytes(), "float32", "bfloat16"))
    assert torch.frombuffer(bytearray(quiet), dtype=torch.bfloat16).isnan().all()
