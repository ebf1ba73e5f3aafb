"""SIGTERM under the deepspeed launcher: Trainer's enable_jit_checkpoint beside spotspeed.run.

The same script on two CPU ranks, told in two ways: SIGTERM to rank 1 alone, and SIGTERM to the
launcher's own process, which is what a scheduler signals, with DataLoader workers. What counts is
whether the launch ends within the limit, with which code, what step its newest whole checkpoint
holds, and whether the same command goes on from there. Seconds depend on the machine; counts do
not. Needs transformers and accelerate.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

import spotspeed

ROOT = Path(__file__).resolve().parent.parent
JOB = ROOT / "benchmarks" / "jobs" / "jit_job.py"
START_S = 600.0
SIGNAL_STEP = 5
MORE_STEPS = 3


@dataclass(frozen=True)
class Case:
    """Whom SIGTERM is sent to, and with how many DataLoader workers a rank."""

    name: str
    to_launcher: bool
    workers: int


CASES = (Case("rank 1 alone", False, 0), Case("the launcher, 2 workers", True, 2))
CONTENDERS = ("enable_jit_checkpoint", "spotspeed.run")


@dataclass(frozen=True)
class Result:
    """What became of one launch; `code` is None when it did not end within the limit."""

    contender: str
    case: str
    step: int
    """Newest step that the script had ended when it was signalled, or later."""
    code: int | None
    seconds: float
    whole: int | None
    """Step of the newest checkpoint that Trainer can resume from; None: there is none."""
    torn: tuple[str, ...]
    """Checkpoint directories that lack trainer_state.json."""
    resumed: bool | None
    """Whether the same command, started again, trained on; None: not tried."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit-s", type=float, default=60.0, help="from SIGTERM to the end")
    parser.add_argument("--resume", action="store_true", help="start each again afterwards")
    parser.add_argument("--only", default="", help="contenders whose names start so")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def command(contender: str, case: Case, folder: Path, port: int, steps: int) -> list[str]:
    config = {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto", "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    }  # fmt: skip
    is_ours = contender == "spotspeed.run"
    if is_ours:
        config["spotspeed"] = {"path": str(folder / "store"), "interval": {"seconds": None}}
    (folder / "config.json").write_text(json.dumps(config))
    words = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2",
             "--master_port", str(port)]  # fmt: skip
    words += ["--module", "spotspeed.run"] if is_ours else []
    words += [str(JOB), str(folder), "--output_dir", str(folder / "out"),
              "--deepspeed", str(folder / "config.json"), "--use_cpu", "--ddp_backend", "gloo",
              "--max_steps", str(steps), "--save_steps", "100000", "--report_to", "none",
              "--disable_tqdm", "True", "--per_device_train_batch_size", "4",
              "--dataloader_num_workers", str(case.workers)]  # fmt: skip
    return words if is_ours else [*words, "--enable_jit_checkpoint", "True"]


def steps_of(folder: Path) -> list[int]:
    file = folder / "steps"
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def launch(words: list[str], folder: Path, port: int) -> subprocess.Popen[str]:
    from tests.ranks import rank_environment

    with open(folder / "log", "a") as log:
        return subprocess.Popen(
            words, cwd=folder, env=rank_environment(port, {"PYTHONPATH": str(ROOT)}), stdout=log,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True, text=True,
        )  # fmt: skip


def await_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    end = time.monotonic() + START_S
    while not any(done >= step for done in steps_of(folder)):
        if process.poll() is not None or time.monotonic() > end:
            end_all(process)
            raise SystemExit((folder / "log").read_text()[-6000:])
        time.sleep(0.02)


def target(process: subprocess.Popen[str], folder: Path, case: Case) -> int:
    """Whom to signal: rank 1, or the process that `deepspeed` itself has started."""
    if not case.to_launcher:
        return int((folder / "pid-1").read_text())
    found = [child.pid for child in psutil.Process(process.pid).children()
             if "deepspeed.launcher.launch" in child.cmdline()]  # fmt: skip
    return found[0]


def end_all(process: subprocess.Popen[str]) -> None:
    """End a launch with everything that it has started."""
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    for each in (*tree, process):
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def run(contender: str, case: Case, options: argparse.Namespace) -> Result:
    from tests.ranks import free_port

    with tempfile.TemporaryDirectory(prefix="spotspeed-jit-") as name:
        folder, port = Path(name), free_port()
        process = launch(command(contender, case, folder, port, 100_000), folder, port)
        await_step(process, folder, SIGNAL_STEP)
        os.kill(target(process, folder, case), signal.SIGTERM)
        began = time.monotonic()
        try:
            code: int | None = process.wait(options.limit_s)
        except subprocess.TimeoutExpired:
            code = None
        seconds = time.monotonic() - began
        end_all(process)
        step, resumed = max(steps_of(folder)), None
        whole, torn = checkpoints(contender, folder)
        if options.resume:
            resumed = goes_on(contender, case, folder, whole or 0)
        return Result(contender, case.name, step, code, seconds, whole, torn, resumed)


def checkpoints(contender: str, folder: Path) -> tuple[int | None, tuple[str, ...]]:
    """(step of the newest whole checkpoint, names of those that are not)."""
    found = sorted((folder / "out").glob("checkpoint-*"))
    torn = tuple(path.name for path in found if not (path / "trainer_state.json").exists())
    if contender == "spotspeed.run":
        sealed = spotspeed.list_checkpoints(str(folder / "store"))
        return (sealed[0].step if sealed else None), torn
    whole = [int(path.name.partition("-")[2]) for path in found if path.name not in torn]
    return max(whole, default=None), torn


def goes_on(contender: str, case: Case, folder: Path, step: int) -> bool:
    """Whether the same command trains on from `step`, and ends."""
    from tests.ranks import free_port

    (folder / "steps").unlink()
    port = free_port()
    process = launch(
        command(contender, case, folder, port, step + MORE_STEPS), folder, port
    )  # fmt: skip
    try:
        code = process.wait(START_S)
    except subprocess.TimeoutExpired:
        code = None
    end_all(process)
    return code == 0 and steps_of(folder)[:1] == [step + 1]


def show(results: list[Result]) -> None:
    print("| SIGTERM to | | ends with | newest whole checkpoint | torn | goes on |")
    print("|---|---|---|---|---|---|")
    for one in results:
        ended = f"hangs ({one.seconds:.0f} s)" if one.code is None else (
            f"{one.code} after {one.seconds:.1f} s")  # fmt: skip
        whole = "none" if one.whole is None else f"step {one.whole} of {one.step}"
        goes_on = {None: "", True: "yes", False: "no"}[one.resumed]
        torn = ", ".join(one.torn)
        print(f"| {one.case} | {one.contender} | {ended} | {whole} | {torn} | {goes_on} |")


def main() -> None:
    options = parse()
    sys.path.insert(0, str(ROOT))
    results = [run(contender, case, options) for case in CASES for contender in CONTENDERS
               if contender.startswith(options.only)]  # fmt: skip
    if options.json:
        print(json.dumps([asdict(one) for one in results], indent=2))
    else:
        show(results)


if __name__ == "__main__":
    main()
