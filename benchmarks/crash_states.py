"""What a crash may leave of a save: DeepSpeed's, torch.distributed.checkpoint's and spotspeed's.

The system calls of two real saves are recorded (strace), and after each of them the states that the
disk may be in after a crash are enumerated: what was not fsynced is there, torn, or not
(spotspeed/testing/crash_disk.py). Each state is then read as the next launch would read it. Counts,
not times: they depend on the seed and on the number of states per point alone.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import pickle
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from spotspeed.testing.crash_disk import CrashStates  # noqa: E402
from spotspeed.testing.syscalls import Mark, record  # noqa: E402

JOB = ROOT / "benchmarks" / "jobs" / "crash_job.py"
SEED = 20_261_124
Tree = dict[str, bytes]
Judge = Callable[[Path, Tree, Tree, str], str]
BROKEN = (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError,
          ImportError, pickle.UnpicklingError, struct.error)  # fmt: skip
"""What torch.load and pickle raise for files that are not what was written."""
VERDICTS = ("as promised", "nothing yet", "older than promised", "lost", "does not load",
            "loads wrong")  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--savers", nargs="*", default=["deepspeed", "dcp", "spotspeed"])
    parser.add_argument("--per-point", type=int, default=12, help="states after each change")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def environment() -> dict[str, str]:
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29531",
        "TORCH_EXTENSIONS_DIR": os.environ.get(
            "TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_extensions")
        ),
    }  # fmt: skip


def files_of(tree: Tree, folder: str) -> Tree:
    return {path: data for path, data in tree.items()
            if path.startswith(f"{folder}/") and not path.endswith("/")}  # fmt: skip


def number_of(tag: str) -> int:
    return int(tag.rpartition("-")[2] or 0) if tag else 0


def is_equal(found: Any, right: Any) -> bool:
    """Whether two loaded values are the same, tensors bit by bit."""
    if isinstance(right, torch.Tensor):
        return torch.is_tensor(found) and torch.equal(found, right)
    if isinstance(right, dict):
        return found.keys() == right.keys() and all(
            is_equal(found[key], value) for key, value in right.items()
        )
    if isinstance(right, (list, tuple)):
        return len(found) == len(right) and all(map(is_equal, found, right))
    return type(found) is type(right) and (hasattr(right, "__dict__") or bool(found == right))


def judge_deepspeed(place: Path, tree: Tree, right: Tree, promised: str) -> str:
    """As `load_checkpoint(dir)` reads: what `latest` names, every file of it by torch.load."""
    latest = tree.get("latest")
    if latest is None:
        return "lost" if promised else "nothing yet"
    tag = latest.decode(errors="replace").strip()
    expected = files_of(right, tag)
    found = files_of(tree, tag)
    if not expected or found.keys() != expected.keys():
        return "does not load"
    changed = [path for path in found if found[path] != expected[path]]
    try:
        loaded = [torch.load(place / path, weights_only=False) for path in changed]
    except BROKEN:
        return "does not load"
    for path, value in zip(changed, loaded, strict=True):
        if not is_equal(value, torch.load(io.BytesIO(expected[path]), weights_only=False)):
            return "loads wrong"
    return "older than promised" if number_of(tag) < number_of(promised) else "as promised"


def judge_dcp(place: Path, tree: Tree, right: Tree, promised: str) -> str:
    """The newest directory with a .metadata, which DCP writes last; read by its own load."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    tags = sorted({path.split("/")[0] for path in tree if path.endswith("/.metadata")})
    if not tags:
        return "lost" if promised else "nothing yet"
    target = {f"layer.{n}": torch.zeros(40_000) for n in range(2)}
    try:
        checkpoint.load(target, checkpoint_id=str(place / tags[-1]))
    except (*BROKEN, CheckpointException):
        return "does not load"
    for n in range(2):
        wanted = torch.arange(40_000) + 1000.0 * number_of(tags[-1]) + n
        if not torch.equal(target[f"layer.{n}"], wanted):
            return "loads wrong"
    return "older than promised" if number_of(tags[-1]) < number_of(promised) else "as promised"


def judge_spotspeed(place: Path, tree: Tree, right: Tree, promised: str) -> str:
    """As a restore reads: the newest that is sealed and verifies."""
    from spotspeed.checkpoint.catalog import list_sealed
    from spotspeed.checkpoint.reader import CheckpointReader
    from spotspeed.core.layout import TensorKey
    from spotspeed.storage.local import LocalStorage

    storage = LocalStorage(place)
    listed = list_sealed(storage)
    for info in listed:
        reader = CheckpointReader.open(storage, info.directory, digest=info.digest)
        if reader.find_damage().damages:
            return "does not load"
        for n in range(2):
            found = torch.from_numpy(reader.read_tensor(TensorKey("fp32", f"layer.{n}")))
            if not torch.equal(found, torch.arange(40_000) + 1000.0 * info.step + n):
                return "loads wrong"
    if not listed:
        return "lost" if promised else "nothing yet"
    newest = listed[0].step
    return "older than promised" if newest < number_of(promised) else "as promised"


JUDGES: dict[str, Judge] = {
    "deepspeed": judge_deepspeed, "dcp": judge_dcp, "spotspeed": judge_spotspeed,
}  # fmt: skip


def content(top: Path) -> Tree:
    return {str(path.relative_to(top)): path.read_bytes()
            for path in top.rglob("*") if path.is_file()}  # fmt: skip


def examine(saver: str, folder: Path, per_point: int) -> dict[str, Any]:
    """Record one job, then judge every distinct state that a crash of it may leave."""
    top = folder / "disk"
    top.mkdir()
    command = [sys.executable, str(JOB), str(top), saver]
    log = record(command, top, folder / "log", env=environment(), timeout_s=600)
    right = content(top)
    place, promised = folder / "state", ""
    crash = CrashStates(1, place, seed=SEED, per_point=per_point)
    counts: Counter[str] = Counter()
    for entry in log:
        if isinstance(entry, Mark):
            promised = entry.word.removeprefix("returned ")
            crash.renew()
        else:
            crash.take(entry)
        for tree in crash.laid_out():
            counts[JUDGES[saver](place, tree, right, promised)] += 1
    kinds = Counter(getattr(entry, "kind", "mark") for entry in log)
    return {"saver": saver, "changes": sum(kinds.values()) - kinds["mark"],
            "fsyncs": kinds["sync_file"], "directory_fsyncs": kinds["sync_directory"],
            "states": crash.states, "distinct": crash.distinct,
            **{verdict: counts[verdict] for verdict in VERDICTS}}  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> str:
    """Rows of counts, one column a saver."""
    names = [result["saver"] for result in results]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for key in results[0]:
        if key != "saver":
            cells = " | ".join(str(result[key]) for result in results)
            lines.append(f"| {key.replace('_', ' ')} | {cells} |")
    return "\n".join(lines)


def main() -> int:
    options = parse()
    logging.getLogger("spotspeed").setLevel(logging.CRITICAL)
    results = []
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    for saver in options.savers:
        with tempfile.TemporaryDirectory(dir=base) as folder:
            results.append(examine(saver, Path(folder), options.per_point))
    text = json.dumps(results) if options.json else table(results)
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"crash_states.py needs strace that may trace: {error}")
