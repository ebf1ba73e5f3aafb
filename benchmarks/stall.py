"""How long a save holds the step loop, and when it is durable, beside DeepSpeed's and DCP's.

Two ranks, ZeRO-2 in bf16, all contenders once a round in turning order on one engine. "held" is
what the save adds between steps: hooks and waits at the gate for spotspeed, the call for the others
(each the worst of the ranks); "durable" is the time from the step's end until the files are sealed
(or until the others say that they are done: they do not fsync). "step" is the median step while a
save is running, divided by that of steps without one.

Each contender holds memory only when it has had its turn, so that what does not fit side by side
can be measured with `--only`, in launches that share spotspeed's and the raw write. 4 GB of state
(`--width 2048 --layers 80`) takes about 13 GB beside the page cache, and 4 GB more with each of
plain memcpy, DCP's thread, DCP's process and DCP's cached.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JOB = "benchmarks/jobs/stall_job.py"


@dataclass(frozen=True)
class Result:
    """Low quartile, median and high quartile, in ms; `step` is a ratio, None without steps."""

    name: str
    held_ms: tuple[float, float, float]
    durable_ms: tuple[float, float, float]
    step: float | None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=44, help="44 of width 768: 0.31 GB")
    parser.add_argument("--step-s", type=float, default=0.5)
    parser.add_argument("--busy", action="store_true", help="pad steps with work, not with sleep")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="contenders whose names start with one of: A;B")
    parser.add_argument("--directory", default=None, help="where to write; default: a temporary")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def launch(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the ranks; what rank 0 found."""
    sys.path.insert(0, str(ROOT))
    from tests.ranks import free_port, launch_command, rank_environment

    words = ["--folder", str(folder), "--out", str(folder / "out.json")]
    for name in ("width", "layers", "step_s", "rounds", "only"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    with open(folder / "log", "w") as log:
        ended = subprocess.run(
            launch_command(options.ranks, JOB, *words, *(["--busy"] if options.busy else [])),
            cwd=ROOT, env=rank_environment(free_port()), stdout=log, stderr=subprocess.STDOUT,
            check=False,
        )  # fmt: skip
    if ended.returncode:
        raise SystemExit(f"exit {ended.returncode}\n{(folder / 'log').read_text()[-6000:]}")
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def results(found: dict[str, Any]) -> list[Result]:
    idle = [step for one in found["rounds"].get("no save", []) for step in one["steps_s"]]
    answers = []
    for name, rounds in found["rounds"].items():
        steps = [step for one in rounds for step in one["steps_s"]]
        answers.append(Result(
            name, spread([one["held_s"] for one in rounds]),
            spread([one["durable_s"] for one in rounds]),
            statistics.median(steps) / statistics.median(idle) if steps and idle else None,
        ))  # fmt: skip
    return answers


def spread(seconds: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(seconds, n=4)
    return low * 1e3, median * 1e3, high * 1e3


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        found = launch(options, Path(folder))
    answers = results(found)
    if options.json:
        print(json.dumps({**found, "cores": os.cpu_count(), "load": os.getloadavg(),
                          "results": [asdict(one) for one in answers]}))  # fmt: skip
        return
    print(f"{found['bytes'] / 1e6:.0f} MB in {found['parameters']} parameters on {options.ranks} "
          f"ranks, steps of {found['step_s']:.2f} s ({found['bare_step_s']:.2f} s of them "
          f"DeepSpeed's), {options.rounds} rounds, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    for one in answers:
        held, durable = (f"{m:8.1f} ({low:.1f} to {high:.1f})"
                         for low, m, high in (one.held_ms, one.durable_ms))  # fmt: skip
        step = "" if one.step is None else f"step x {one.step:.2f}"
        print(f"{one.name:28} held {held:>28} ms   durable {durable:>28} ms   {step}")


if __name__ == "__main__":
    main()
