"""Hugging Face Trainer under `spotspeed.run`: interrupted anywhere, it goes on bit for bit."""

from __future__ import annotations

import importlib.util
import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import spotspeed
from spotspeed.checkpoint.rotation import given_up
from spotspeed.cli import app
from spotspeed.integrations.huggingface_files import prepare
from spotspeed.storage import open_storage
from tests.distributed.job import Job, Launch, Launcher, by_mpirun
from tests.ranks import ROOT, free_port

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None
        or importlib.util.find_spec("accelerate") is None,
        reason='needs transformers and accelerate: pip install "spotspeed[huggingface]"',
    ),
]
SCRIPT = ROOT / "tests" / "distributed" / "drivers" / "hf_train.py"
STEPS = 24
"""Of a whole training: three epochs of eight steps."""


def job_at(folder: Path, stage: int = 2, **block: Any) -> Job:
    return Job(folder, stage, {"interval": {"seconds": None}, **block}, script=SCRIPT)


def words_of(job: Job, *more: str, is_plain: bool = False) -> list[str]:
    """The script's arguments for one training; a plain one has no block."""
    job.folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": job.stage, "stage3_gather_16bit_weights_on_model_save": job.stage == 3,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    }  # fmt: skip
    if not is_plain:
        config["spotspeed"] = {"path": str(job.path), **job.block}
    file = job.folder / "ds_config.json"
    file.write_text(json.dumps(config))
    return [str(job.log), "--output_dir", str(job.folder / "out"), "--deepspeed", str(file),
            "--use_cpu", "--ddp_backend", "gloo", "--per_device_train_batch_size", "4",
            "--learning_rate", "0.01", "--num_train_epochs", str(STEPS // 8),
            "--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "True",
            *more]  # fmt: skip


def start(job: Job, words: list[str], ranks: int = 2, launcher: Launcher = by_mpirun) -> Launch:
    port = free_port()
    return Launch(job, port, [*launcher(ranks, port), "-m", "spotspeed.run", str(SCRIPT), *words])


def by_step(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Everything that was logged of each step; what was logged twice must agree."""
    found: dict[int, dict[str, Any]] = {}
    for record in records:
        assert found.setdefault(record["step"], record) == record
    return found


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.full)])
def test_trainer_is_interrupted_and_goes_on_bit_for_bit(stage: int, tmp_path: Path) -> None:
    plain, job = job_at(tmp_path / "plain", stage), job_at(tmp_path / "job", stage)
    saves = ("--save_steps", "5", "--save_total_limit", "2")
    whole = words_of(plain, "--save_strategy", "no", is_plain=True)
    with start(job, [*whole, "--then", *words_of(job, *saves)]) as launch:
        launch.wait_step(6)
        launch.ranks()[1].send_signal(signal.SIGUSR1)
        finished = launch.finish()
    assert finished.returncode == 75, finished.output[-6000:]
    reference, last = by_step(plain.records()), job.records()[-1]["step"]
    assert len(reference) == STEPS and job.sealed()[0] == last
    with start(job, words_of(job, *saves)) as launch:
        finished = launch.finish()
    assert finished.returncode == 0, finished.output[-6000:]
    assert launch.records()[0]["step"] == last + 1 and STEPS - last >= 4
    assert by_step(job.records()) == reference, "losses, rates, epochs and history"
    check_rotated(job)
    check_mended(job)
    check_exported(job)


def check_rotated(job: Job) -> None:
    """Trainer keeps two directories, and what stood behind the others is gone, or about to go."""
    kept = {path.name for path in (job.folder / "out").iterdir()}
    storage = open_storage(job.path)
    stored = {info.tag.replace("global_step", "checkpoint-")
              for info in spotspeed.list_checkpoints(str(job.path))
              if info.reason == "explicit" and info.directory not in given_up(storage)}  # fmt: skip
    assert len(kept) == 2 and stored == kept


def check_mended(job: Job) -> None:
    """A newest directory that a crash left half written is completed, or put out of the way."""
    out, newest = job.folder / "out", job.folder / "out" / f"checkpoint-{STEPS}"
    names = ("trainer_state.json", "rng_state_0.pth", "rng_state_1.pth")
    before = [(newest / name).read_bytes() for name in names]
    for name in names:
        (newest / name).unlink()
    (out / "checkpoint-99").mkdir()
    prepare(str(out), str(job.path))
    state, rng, _ = ((newest / name).read_bytes() for name in names)
    written = [json.loads(text) for text in (before[0], state)]
    for fields in written:
        del fields["stateful_callbacks"], fields["total_flos"]  # Of Trainer's own save alone.
    assert written[0] == written[1] and written[0]["global_step"] == STEPS
    theirs, ours = (torch.load(io.BytesIO(data), weights_only=False) for data in (before[1], rng))
    assert theirs["python"] == ours["python"] and torch.equal(theirs["cpu"], ours["cpu"])
    assert {path.name.partition(".")[0] for path in out.glob("*unfinished*")} == {"checkpoint-99"}
    assert not (out / "checkpoint-99").exists()


def check_exported(job: Job) -> None:
    """What the README says for `from_pretrained`, where only the weights are in a directory."""
    from transformers import AutoConfig, GPT2LMHeadModel

    newest = job.folder / "out" / f"checkpoint-{STEPS}"
    expected = GPT2LMHeadModel.from_pretrained(newest).state_dict()
    config = AutoConfig.from_pretrained(newest)
    for name in ("model.safetensors", "config.json"):
        (newest / name).unlink()
    tag = spotspeed.list_checkpoints(str(job.path))[0].tag
    done = CliRunner().invoke(app, ["export", str(job.path), tag, "--to", "safetensors",
                                    str(newest / "model.safetensors")])  # fmt: skip
    assert done.exit_code == 0, done.output
    found = GPT2LMHeadModel.from_pretrained(newest, config=config).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
