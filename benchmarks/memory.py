"""How much memory of the host a save takes, beside the pool.

Two ranks, ZeRO-2 in bf16, one contender after the other in one job. While each saves, the private
memory (RssAnon) of all ranks and of the saver is sampled from outside; what steps alone reach is
taken off. The pool (shared memory of a fixed size) is shown by itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
JOB = "benchmarks/jobs/stall_job.py"
PERIOD_S = 0.005
IDLE = "no save"
CONTENDERS = (IDLE, "spotspeed, periodic", "spotspeed, save and wait", "DCP async_save, thread")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=30, help="30 of width 2048: 1.5 GB")
    parser.add_argument("--step-s", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", default=None, help="where to write; default: a temporary")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def memory_bytes(pid: int) -> dict[str, int]:
    """RssAnon and RssShmem of a process; nothing when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {"RssAnon": 0, "RssShmem": 0}
    words = (line.split()[:2] for line in lines if line.startswith(("RssAnon", "RssShmem")))
    found = {name.rstrip(":"): int(kib) * 1024 for name, kib in words}
    return {"RssAnon": 0, "RssShmem": 0} | found


def processes(launch: psutil.Process, folder: Path) -> tuple[list[int], list[int]]:
    """The ranks with whatever they started, and the savers of the job, by pid."""
    ranks = [one.pid for one in launch.children(recursive=True)]
    savers = [one.pid for one in psutil.process_iter(["cmdline"])
              if "spotspeed.agent" in (one.info["cmdline"] or [])
              and any(str(folder) in word for word in one.info["cmdline"])]  # fmt: skip
    return ranks, savers


def sample(launch: psutil.Popen, folder: Path) -> dict[str, list[dict[str, int]]]:
    """By contender and round, the peaks over its time: of the ranks, of the saver, of the pool."""
    peaks: dict[str, dict[str, int]] = {}
    found_at, ranks, savers = 0.0, list[int](), list[int]()
    while launch.poll() is None:
        if time.monotonic() > found_at + 1:
            ranks, savers = processes(launch, folder)
            found_at = time.monotonic()
        now = folder / "now"
        turn = now.read_text() if now.exists() else ""
        if turn:
            of_ranks = [memory_bytes(pid) for pid in ranks]
            of_savers = [memory_bytes(pid) for pid in savers]
            seen = {
                "ranks": sum(one["RssAnon"] for one in of_ranks),
                "saver": sum(one["RssAnon"] for one in of_savers),
                "pool": max([0, *(one["RssShmem"] for one in of_savers)]),
            }
            peak = peaks.setdefault(turn, seen)
            peaks[turn] = {name: max(peak[name], seen[name]) for name in seen}
        time.sleep(PERIOD_S)
    rounds: dict[str, list[dict[str, int]]] = {}
    for turn, peak in peaks.items():
        number, name = turn.split(" ", 1)
        if int(number):  # the first round warms everything up
            rounds.setdefault(name, []).append(peak)
    return rounds


def launch(options: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, int]]]:
    sys.path.insert(0, str(ROOT))
    from tests.ranks import free_port, launch_command, rank_environment

    words = ["--folder", str(folder), "--out", str(folder / "out.json"),
             "--only", ";".join(CONTENDERS)]  # fmt: skip
    for name in ("width", "layers", "step_s", "rounds"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    with open(folder / "log", "w") as log:
        started = psutil.Popen(
            launch_command(options.ranks, JOB, *words), cwd=ROOT,
            env=rank_environment(free_port()), stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        found = sample(started, folder)
    if started.returncode:
        raise SystemExit(f"exit {started.returncode}\n{(folder / 'log').read_text()[-6000:]}")
    return found


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        found = launch(options, Path(folder))
    idle = max(one["ranks"] for one in found[IDLE])
    rows = {
        name: {
            "ranks_mb": (max(one["ranks"] for one in rounds) - idle) / 1e6,
            "saver_mb": max(one["saver"] for one in rounds) / 1e6,
            "pool_mb": max(one["pool"] for one in rounds) / 1e6,
        }
        for name, rounds in found.items()
    }
    if options.json:
        print(json.dumps(rows))
        return
    for name, row in rows.items():
        print(f"{name:28} ranks {row['ranks_mb']:+8.0f} MB   saver {row['saver_mb']:6.0f} MB   "
              f"pool {row['pool_mb']:6.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
