"""The saver's promises hold for what its processes really asked of the kernel, seen by strace."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from spotspeed.checkpoint.catalog import list_sealed, scan
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.storage.local import LocalStorage
from spotspeed.testing.crash_disk import CrashStates, DiskState, Operation
from spotspeed.testing.syscalls import Mark, UnseenChangeError, parse, record, strace_command
from tests.ranks import ROOT, free_port, rank_environment

SEED = 20_261_124
JOB = Path(__file__).parent / "traced_job.py"
STORE = "runs/job"


def can_trace(log: Path) -> bool:
    try:
        command = strace_command(log, ["true"])
    except FileNotFoundError:
        return False
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[Operation | Mark]:
    """Everything that the job's processes changed below one directory."""
    place = tmp_path_factory.mktemp("traced")
    if not can_trace(place / "probe.log"):
        pytest.skip("strace is not installed, or may not trace here")
    (place / "disk").mkdir()
    command = [sys.executable, str(JOB), str(place / "disk" / STORE)]
    environment = rank_environment(free_port(), {"PYTHONPATH": str(ROOT)})
    return record(command, place / "disk", place / "log", env=environment, timeout_s=180)


def judge(root: Path, sealed: set[str]) -> list[str]:
    """What is wrong with the store that a crash left at `root`, when `sealed` were promised."""
    storage = LocalStorage(root)
    complaints = [f"{item.directory} is damaged: {item.cause}" for item in scan(storage).damaged]
    listed = list_sealed(storage, lineage=False)
    complaints += [f"{name} was promised and is not listed"
                   for name in sealed - {info.directory for info in listed}]  # fmt: skip
    for info in listed:
        reader = CheckpointReader.open(storage, info.directory, digest=info.digest)
        complaints += [f"{info.directory}: {damage}" for damage in reader.find_damage().damages]
    return complaints


def explore(log: Sequence[Operation | Mark], place: Path, per_point: int) -> tuple[int, list[str]]:
    """(crash states looked at, complaints); stops at the first point with a complaint."""
    crash, sealed = CrashStates(1, place, seed=SEED, per_point=per_point), set[str]()
    for entry in log:
        if isinstance(entry, Mark):
            what, _, directory = entry.word.partition(" ")
            sealed = {directory} if what == "kept" else sealed | {directory}
            crash.renew()
        else:
            crash.take(entry)
        for _ in crash.laid_out():
            if complaints := judge(place / STORE, sealed):
                return crash.states, complaints
    return crash.states, []


@pytest.fixture
def place(tmp_path: Path) -> Path:
    memory = Path("/dev/shm")
    base = memory if os.access(memory, os.W_OK) else tmp_path
    return base / f"spotspeed-{os.getpid()}-{tmp_path.name}"


def test_a_crash_after_any_system_call_of_the_saver_breaks_no_promise(recorded, place):
    states, complaints = explore(recorded, place, per_point=5)
    shutil.rmtree(place, ignore_errors=True)
    kinds = [entry.kind for entry in recorded if isinstance(entry, Operation)]
    print(f"seed {SEED}: {len(kinds)} changes, {states} states")
    assert complaints == []
    assert kinds.count("sync_file") >= 12 and kinds.count("sync_directory") >= 12
    assert [entry.word.split()[0] for entry in recorded if isinstance(entry, Mark)] == [
        "sealed", "sealed", "sealed", "kept",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["sync_file", "sync_directory"])
def test_without_these_syncs_the_same_recording_breaks_promises(recorded, place, kind):
    without = [entry for entry in recorded
               if isinstance(entry, Mark) or entry.kind != kind]  # fmt: skip
    _, complaints = explore(without, place, per_point=6)
    shutil.rmtree(place, ignore_errors=True)
    assert complaints


def test_each_call_is_read_as_what_it_did(tmp_path):
    if not can_trace(tmp_path / "probe.log"):
        pytest.skip("strace is not installed, or may not trace here")
    top = tmp_path / "top"
    top.mkdir()
    code = f"""if True:
        import os
        top = {str(top)!r} + "/"
        os.mkdir(top + "d")
        file = os.open(top + "d/.tmp", os.O_WRONLY | os.O_CREAT)
        os.write(file, b'one "\\n')
        os.lseek(file, 1, 0)
        os.writev(file, [b"N", b"E"])
        os.pwrite(file, b"!", 9)
        os.pwritev(file, [b"a", b"", b"bc"], 6)
        os.fsync(file)
        directory = os.open(top + "d", os.O_RDONLY)
        os.rename(".tmp", "a", src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
        os.write(file, b"s")
        os.fdatasync(file)
        os.link(top + "d/a", top + "d/b")
        os.unlink(top + "d/a")
        os.truncate(top + "d/b", 2)
        open(top + "d/b", "a").write("x")
        open(top + "other", "w").close()
        os.rename(top + "other", top + "third")
        os.remove(top + "third")
        os.access("/spotspeed-mark/done here", os.F_OK)
        os.mkdir(top + "e")
        os.rmdir(top + "e")
    """
    log = record([sys.executable, "-c", code], top, tmp_path / "log")
    assert Mark("done here") in log
    state = DiskState(1)
    kinds = []
    for entry in log:
        if isinstance(entry, Operation):
            kinds.append(entry.kind)
            state.apply(entry)
    [durable] = [tree for tree in state.crash_states(random.Random(1), 10**9)
                 if tree.keys() == {"d/", "d/b"} and tree["d/b"] == b"oNx"][:1]  # fmt: skip
    assert (top / "d" / "b").read_bytes() == durable["d/b"]
    assert kinds.count("sync_file") == 2 and kinds.count("sync_directory") == 1


def test_a_change_that_cannot_be_followed_is_refused(tmp_path):
    if not can_trace(tmp_path / "probe.log"):
        pytest.skip("strace is not installed, or may not trace here")
    top = tmp_path / "top"
    top.mkdir()
    code = (
        f"import mmap; file = open({str(top / 'f')!r}, 'w+b'); file.write(bytes(4096)); "
        "file.flush(); mmap.mmap(file.fileno(), 4096)[0] = 1"
    )
    with pytest.raises(UnseenChangeError, match="mmap"):
        record([sys.executable, "-c", code], top, tmp_path / "log")
    assert isinstance(next(parse(tmp_path / "log", top)), Operation)


def test_a_process_that_works_below_the_directory_is_refused(tmp_path):
    if not can_trace(tmp_path / "probe.log"):
        pytest.skip("strace is not installed, or may not trace here")
    code = f"import os; os.chdir({str(tmp_path)!r})"
    with pytest.raises(UnseenChangeError, match="relative"):
        record([sys.executable, "-c", code], tmp_path, tmp_path / "log")
