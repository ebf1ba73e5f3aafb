"""A training job of a test: the example script, its config, its launches and what they logged."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import spotspeed
from tests.ranks import ROOT, Finished, free_port, rank_environment, remove_shared_memory, stop

TRAIN = ROOT / "examples" / "train_gpt.py"
SIZE = ("--width", "64", "--layers", "2", "--context", "32", "--dropout", "0.1")
LIMIT_S = 300.0
"""Longest time of one launch, on a machine that others use as well."""
ENDLESS = 100_000
"""Steps of a launch that is going to be interrupted."""
_LINES = ("import spotspeed", "checkpointer = spotspeed.attach(engine)", "checkpointer.restore()")


def ds_config(stage: int, block: dict[str, Any] | None, batch: int = 6) -> dict[str, Any]:
    """A DeepSpeed config; its global batch fits 1, 2, 3 and 6 ranks."""
    config: dict[str, Any] = {
        "train_batch_size": batch, "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage}, "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20}},
        "steps_per_print": 1_000_000,
    }  # fmt: skip
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
    return config | ({} if block is None else {"spotspeed": block})


def without_spotspeed(folder: Path) -> Path:
    """The example script with its three lines taken out."""
    lines = TRAIN.read_text().splitlines()
    kept = [line for line in lines if line.strip() not in _LINES]
    assert len(kept) == len(lines) - 3
    script = folder / "train_gpt.py"
    script.write_text("\n".join(kept) + "\n")
    return script


def scripts(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def by_mpirun(ranks: int, port: int) -> list[str]:
    return [scripts("mpirun"), "-n", str(ranks), "--map-by", "slot:OVERSUBSCRIBE", "--bind-to",
            "none", "--allow-run-as-root", sys.executable]  # fmt: skip


def by_deepspeed(ranks: int, port: int) -> list[str]:
    return [scripts("deepspeed"), "--num_gpus", str(ranks), "--master_port", str(port)]


def by_torchrun(ranks: int, port: int) -> list[str]:
    return [scripts("torchrun"), "--nproc-per-node", str(ranks), "--master-port", str(port)]


def by_accelerate(ranks: int, port: int) -> list[str]:
    return [scripts("accelerate"), "launch", "--use_deepspeed", "--num_processes", str(ranks),
            "--main_process_port", str(port)]  # fmt: skip


Launcher = Callable[[int, int], list[str]]
AS_MODULE: dict[Launcher, list[str]] = {
    # Without the dashes these two take a script's options for abbreviations of their own.
    by_torchrun: ["-m", "--"], by_accelerate: ["-m", "--"], by_deepspeed: ["--module"],
}  # fmt: skip


@dataclass(slots=True)
class Job:
    """One run in its own folder; every launch appends to the same log of losses."""

    folder: Path
    stage: int = 2
    block: dict[str, Any] = field(default_factory=dict)
    script: Path = TRAIN
    is_plain: bool = False
    """Whether the script knows nothing of spotspeed and is started by `spotspeed.run`."""

    @property
    def path(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def log(self) -> Path:
        return self.folder / "losses.jsonl"

    def start(
        self, ranks: int, *, launcher: Launcher = by_mpirun, steps: int = ENDLESS,
        config: dict[str, Any] | None = None, more: Sequence[str] = (),
    ) -> Launch:  # fmt: skip
        """Launch the script; `config` replaces the one that follows from stage and block.

        `more` are options of the script.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if config is None:
            config = ds_config(self.stage, {"path": str(self.path), **self.block})
        file = self.folder / "ds_config.json"
        file.write_text(json.dumps(config))
        port = free_port()
        words = launcher(ranks, port)
        if self.is_plain:
            words += [*AS_MODULE.get(launcher, ["-m"]), "spotspeed.run"]
        words += [str(self.script), "--config", str(file), "--steps", str(steps),
                  "--log", str(self.log), *SIZE, *more]  # fmt: skip
        return Launch(self, port, words)

    def records(self) -> list[dict[str, Any]]:
        """Every step that was logged, in the order of its happening."""
        lines = self.log.read_text().split("\n")[:-1] if self.log.exists() else []
        return [json.loads(line) for line in lines]

    def losses(self) -> dict[int, str]:
        """All digits of the loss by step; a step that was trained twice must agree."""
        found: dict[int, str] = {}
        for record in self.records():
            digits = repr(record["loss"])
            assert found.setdefault(record["step"], digits) == digits, record
        return found

    def sealed(self) -> list[int]:
        """Steps of the sealed checkpoints, newest first."""
        return [info.step for info in spotspeed.list_checkpoints(str(self.path))]


class Launch:
    """One launch of a job in the background."""

    def __init__(self, job: Job, port: int, words: list[str]) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        self.job, self.port = job, port
        self._before = len(job.records())
        self._output = job.folder / f"output-{time.monotonic_ns()}.txt"
        with self._output.open("w") as log:
            self.process = subprocess.Popen(
                words, cwd=job.folder, env=rank_environment(port, {"PYTHONPATH": str(ROOT)}),
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def records(self) -> list[dict[str, Any]]:
        """The steps of this launch."""
        return self.job.records()[self._before :]

    def wait_step(self, step: int) -> None:
        """Wait until this launch has completed `step`."""
        self.wait_until(lambda: any(record["step"] >= step for record in self.records()))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise AssertionError(self.output[-6000:])
            time.sleep(0.005)

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes, by rank."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                environment, words = process.environ(), process.cmdline()
            except psutil.Error:
                continue
            rank = environment.get("OMPI_COMM_WORLD_RANK", environment.get("RANK"))
            is_launcher = "deepspeed.launcher.launch" in words
            if rank is not None and str(self.job.script) in words and not is_launcher:
                found.setdefault(int(rank), process)
        return found

    def interrupt(self, number: signal.Signals, chance: random.Random) -> None:
        """Send a signal to one rank that is not 0, at a moment drawn from `chance`."""
        step, delay_s = chance.randint(4, 10), chance.uniform(0.0, 0.1)
        print(f"signal after step {step} and {delay_s:.4f} s")
        self.wait_step(step)
        ranks = self.ranks()
        victim = ranks[chance.choice([rank for rank in ranks if rank] or [0])]
        time.sleep(delay_s)
        victim.send_signal(number)

    def finish(self) -> Finished:
        """Wait for the end."""
        try:
            self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done after {LIMIT_S} s\n{self.output[-6000:]}") from None
        finally:
            self.close()
        return Finished(self.process.returncode, self.output)

    def close(self) -> None:
        """End what is still running."""
        stop(self.process)
        remove_shared_memory(self.port)

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def new_chance() -> random.Random:
    """A source of moments; its seed is printed, and SPOTSPEED_TEST_SEED repeats it."""
    seed = int(os.environ.get("SPOTSPEED_TEST_SEED", time.time_ns() % 2**32))
    print(f"SPOTSPEED_TEST_SEED={seed}")
    return random.Random(seed)
