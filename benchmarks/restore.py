"""How long a restore takes and what it reads, beside DeepSpeed's own load and ds_to_universal.

One state, written by two ranks in both forms. At the same number of ranks both load it in turn, on
one engine; at another number DeepSpeed converts (`ds_to_universal`) and loads what that wrote. All
files are in the page cache, and the ranks find memory that the machine has already: a virtual one
may have to ask its host for each page that nobody has used for a while, which takes longer than to
read into it. Times are until the slowest rank is done, medians with the middle half.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JOB = "benchmarks/jobs/restore_job.py"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="that write")
    parser.add_argument("--others", type=int, nargs="*", default=[1, 3], help="that read, too")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=44, help="44 of width 768: 0.31 GB")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", default=None, help="where to write; default: a temporary")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def launch(
    options: argparse.Namespace, folder: Path, ranks: int, mode: str, *, beside: bool = False
) -> dict[str, Any]:
    """Run the ranks in one mode; what rank 0 found."""
    sys.path.insert(0, str(ROOT))
    from tests.ranks import free_port, launch_command, rank_environment

    words = [mode, "--folder", str(folder), "--out", str(folder / "out.json")]
    for name in ("width", "layers", "stage", "rounds"):
        words += [f"--{name}", str(getattr(options, name))]
    command = launch_command(ranks, JOB, *words, *(["--beside"] if beside else []))
    # Ranks and saver find their modules compiled, as those of an installed package are.
    environment = rank_environment(free_port(), {"PYTHONPYCACHEPREFIX": str(folder / "compiled")})
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    check(command, folder / "log", environment)
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def convert(folder: Path) -> float:
    """Seconds of DeepSpeed's conversion, after which any number of ranks may load."""
    began = time.perf_counter()
    check(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
         "--num_extract_workers", "2", "--num_merge_workers", "2",
         "--input_folder", str(folder / "deepspeed" / "all"),
         "--output_folder", str(folder / "universal" / "all")],
        folder / "log", {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    (folder / "universal" / "latest").write_text("all")
    return time.perf_counter() - began


def check(command: list[str], log: Path, environment: dict[str, str]) -> None:
    with open(log, "w") as file:
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if ended.returncode:
        raise SystemExit(f"{command}: exit {ended.returncode}\n{log.read_text()[-4000:]}")


def warm(folder: Path) -> None:
    """Bring every file into the page cache, past which savers may write."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                while stream.read(1 << 24):
                    pass


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    launch(options, folder, options.ranks, "write")
    warm(folder)
    found = {"same": launch(options, folder, options.ranks, "load", beside=True), "others": {}}
    found["convert_s"] = convert(folder)
    warm(folder)
    for ranks in options.others:
        found["others"][ranks] = {
            **launch(options, folder, ranks, "load"),
            "theirs_s": launch(options, folder, ranks, "load-universal")["theirs_s"],
        }
    return found


def spread(seconds: list[float]) -> str:
    low, median, high = statistics.quantiles(seconds, n=4)
    return f"{median * 1e3:.0f} ({low * 1e3:.0f} to {high * 1e3:.0f}) ms"


def report(found: dict[str, Any], options: argparse.Namespace) -> None:
    for ranks, one in ((options.ranks, found["same"]), *found["others"].items()):
        needed, asked, read = (sum(rank[what] for rank in one["bytes"])
                               for what in ("needed", "asked", "read"))  # fmt: skip
        print(f"{options.ranks} -> {ranks} ranks: {needed / 1e6:.0f} MB needed, "
              f"{read / needed:.3f} of it read, {asked / needed:.3f} by the kernel")  # fmt: skip
        print(f"    spotspeed: imports {one['import_s'] * 1e3:.0f} ms, attach "
              f"{one['attach_s'] * 1e3:.0f} ms, first restore "
              f"{one['first_s'] * 1e3:.0f} ms, again {spread(one['ours_s'])}")  # fmt: skip
        ours, theirs = statistics.median(one["ours_s"]), statistics.median(one["theirs_s"])
        if one is found["same"]:
            print(f"    DeepSpeed load_checkpoint: {spread(one['theirs_s'])}; "
                  f"spotspeed takes {ours / theirs:.2f} of it")  # fmt: skip
        else:
            total = found["convert_s"] + theirs
            print(f"    ds_to_universal {found['convert_s']:.1f} s + load {spread(one['theirs_s'])}"
                  f"; spotspeed is {total / ours:.1f} times as fast")  # fmt: skip


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        found = measure(options, Path(folder))
    if options.json:
        print(json.dumps({**found, "cores": os.cpu_count(), "load": os.getloadavg()}))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {options.rounds} rounds")
    report(found, options)


if __name__ == "__main__":
    main()
