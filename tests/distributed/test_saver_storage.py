"""The saver and a store that is full, read-only or unknown; and savers of another version."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spotspeed.agent.process import log_directory
from spotspeed.core.saver_protocol import (
    PROTOCOL_VERSION,
    Chunks,
    End,
    Hello,
    Welcome,
    encode,
    encode_preamble,
)
from spotspeed.errors import PoolExhaustedError, StorageError
from spotspeed.staging.client import find_saver, open_session
from spotspeed.staging.launch import saver_address
from tests.distributed.saver_ranks import LIMIT_S, RankProcess, check_sealed, wait_gone
from tests.ranks import ROOT

SMALL = {"count": 4, "elements": 1 << 16}
LARGE = {"count": 8, "elements": 1 << 20}
"""32 MiB of state."""


class Disk:
    """A small file system of its own, in memory."""

    def __init__(self, place: Path, size: str) -> None:
        place.mkdir()
        self.place = place
        self._mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))

    def remount(self, options: str) -> None:
        self._mount("-o", f"remount,{options}", str(self.place))

    def remove(self) -> None:
        subprocess.run(["umount", "-l", str(self.place)], check=True)

    def _mount(self, *arguments: str) -> None:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"needs the right to mount: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk", "16m")
    try:
        yield disk
        session = find_saver(str(disk.place / "store"))
        if session is not None:
            pid = session.saver_pid
            session.close()
            wait_gone(pid, 10)
    finally:
        disk.remove()
        _log(disk.place / "store").unlink(missing_ok=True)


def test_a_full_disk_fails_the_save_and_not_the_next_one(disk: Disk) -> None:
    path = disk.place / "store"
    with RankProcess(path) as rank:
        rank.ask("reserve", size_bytes=32 << 20)
        rank.ask("stage", step=1, **LARGE)
        assert rank.ask("wait_staged", step=1)["staged"]
        answer = rank.ask("result", step=1)
        assert answer["error"] == "StorageError"
        assert "no space is left" in answer["text"]
        assert [file for file in path.rglob("*") if file.is_file()] == []
        rank.ask("stage", step=2, **SMALL)
        assert "digest" in rank.ask("result", step=2)
    check_sealed(path, 2, world_size=1, **SMALL)


def test_what_other_ranks_stored_of_a_save_that_one_has_lost_is_given_back(tmp_path: Path) -> None:
    path, limit = tmp_path / "store", ["prlimit", f"--fsize={20 << 20}"]
    with (
        RankProcess(path, 0, 2, prefix=limit, host_memory_gb=0.015) as small,
        RankProcess(path, 1, 2, prefix=limit, host_memory_gb=0.015) as large,
    ):
        for rank in (small, large):
            rank.ask("reserve", size_bytes=15 << 20)
        small.ask("stage", step=1, **SMALL)
        small.ask("stored", step=1)
        large.ask("stage", step=1, **LARGE)
        assert "ulimit -f" in large.ask("result", step=1)["text"]
        assert "rank 1 failed" in small.ask("result", step=1)["text"]
        assert [file for file in path.rglob("*") if file.is_file()] == []
        for rank in (small, large):
            rank.ask("stage", step=2, **SMALL)
        assert small.ask("result", step=2) == large.ask("result", step=2)
        check_sealed(path, 2, world_size=2, **SMALL)
        urgent = small.ask("stage", step=3, reason="notice", **SMALL)["directory"]
        large.ask("stage", step=3, reason="notice", **LARGE)
        assert "ulimit -f" in large.ask("result", step=3)["text"]
        assert "rank 1 failed" in small.ask("result", step=3)["text"]
        kept = {file.name for file in (path / urgent).iterdir()}
        assert kept == {"rank-00000.receipt", "rank-00000.shard"}, "a notice's is tried again"


def test_a_disk_that_gets_room_in_time_loses_nothing(disk: Disk) -> None:
    path = disk.place / "store"
    with RankProcess(path) as rank:
        rank.ask("reserve", size_bytes=32 << 20)
        rank.ask("stage", step=1, **LARGE)
        _wait_logged(path, "trying again")
        disk.remount("size=64m")
        assert "digest" in rank.ask("result", step=1)
    check_sealed(path, 1, world_size=1, **LARGE)


def test_a_save_that_nobody_waits_for_is_tried_until_the_next_one_begins(disk: Disk) -> None:
    path = disk.place / "store"
    with RankProcess(path) as rank:
        rank.ask("reserve", size_bytes=48 << 20)
        rank.ask("stage", step=1, reason="periodic", **LARGE)
        _wait_logged(path, "trying again in 3.2 s")  # One that is awaited is given up before that.
        rank.ask("stage", step=2, **SMALL)
        assert "no space is left" in rank.ask("result", step=1)["text"]
        assert "digest" in rank.ask("result", step=2)
    check_sealed(path, 2, world_size=1, **SMALL)


def test_a_rank_that_died_is_saved_as_soon_as_the_disk_has_room(disk: Disk) -> None:
    path = disk.place / "store"
    with RankProcess(path) as rank:
        saver = rank.ask("reserve", size_bytes=32 << 20)["saver_pid"]
        rank.ask("stage", step=1, **LARGE)
        rank.ask("wait_staged", step=1)
        rank.kill()
    _wait_logged(path, "trying again")
    disk.remount("size=64m")
    wait_gone(saver)
    check_sealed(path, 1, world_size=1, **LARGE)


def test_a_read_only_disk_fails_the_save(disk: Disk) -> None:
    path = disk.place / "store"
    path.mkdir()
    disk.remount("ro")
    with RankProcess(path) as rank:
        rank.ask("stage", step=1, **SMALL)
        answer = rank.ask("result", step=1)
    assert answer["error"] == "StorageError"
    assert "mounted read-only" in answer["text"]


def test_a_store_that_cannot_be_opened_is_an_error_with_its_reason() -> None:
    url = f"unknown-protocol-{os.getpid()}://bucket/run"
    with pytest.raises(StorageError, match="unknown-protocol"):
        open_session(url, rank=0, arena_bytes=1 << 20, slot_bytes=1 << 18, timeout_s=20)
    (log_directory() / f"{saver_address(url)}.log").unlink()


def test_an_arena_larger_than_memory_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(PoolExhaustedError, match=r"asks for .*host_memory_gb"):
        open_session(str(tmp_path), rank=0, arena_bytes=1 << 42, slot_bytes=1 << 24)


def test_a_saver_of_another_version_leaves_before_a_new_one_starts(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    first = open_session(path, rank=0, arena_bytes=0, slot_bytes=0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as newer:
        newer.connect("\0" + saver_address(path))
        newer.sendall(encode_preamble(os.getpid(), version=PROTOCOL_VERSION + 1))
        newer.settimeout(LIMIT_S)
        newer.recv(64)
        _wait_logged(Path(path), "leaving when done")
        with pytest.raises(StorageError, match="leaves when its work is done"):
            open_session(path, rank=1, arena_bytes=0, slot_bytes=0, timeout_s=1)
        first.close()
        assert newer.recv(64) == b"", "the end of the old saver is what the newer rank waits for"
    second = open_session(path, rank=0, arena_bytes=0, slot_bytes=0)
    assert second.saver_pid != first.saver_pid
    second.close()
    _log(Path(path)).unlink()


@pytest.mark.parametrize("garbage", [
    b"\xff" * 64, encode(End(7)), encode(Chunks(1, 0, (0,))), encode(Welcome(1, 1, 1)),
], ids=["noise", "unknown save", "foreign slot", "wrong direction"])  # fmt: skip
def test_a_rank_that_breaks_the_protocol_only_loses_its_own_session(
    garbage: bytes, tmp_path: Path
) -> None:
    path = str(tmp_path / "store")
    good = open_session(path, rank=0, arena_bytes=1 << 20, slot_bytes=1 << 18)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bad:
        bad.settimeout(LIMIT_S)
        bad.connect("\0" + saver_address(path))
        bad.sendall(encode_preamble(os.getpid()) + encode(Hello(1, os.getpid(), 0, 0)) + garbage)
        while bad.recv(4096):
            pass
    assert good.drain(2, timeout_s=LIMIT_S).sealed == ()
    good.close()
    wait_gone(good.saver_pid)
    log = _log(Path(path))
    assert "ends" in log.read_text()
    log.unlink()


def test_notices_reach_every_rank_of_the_node(tmp_path: Path) -> None:
    path, heard = str(tmp_path / "store"), queue.SimpleQueue[tuple[float, str]]()
    ranks = [
        open_session(path, rank=rank, arena_bytes=0, slot_bytes=0,
                     on_notice=lambda deadline_s, source: heard.put((deadline_s, source)))
        for rank in range(2)
    ]  # fmt: skip
    visitor = find_saver(path)
    assert visitor is not None
    visitor.notify(25.0, "notify")
    assert [heard.get(timeout=LIMIT_S) for _ in ranks] == [(25.0, "notify")] * 2
    for session in (visitor, *ranks):
        session.close()


def test_a_daemonic_process_of_multiprocessing_can_start_a_saver(tmp_path: Path) -> None:
    script = (
        "import multiprocessing, sys\n"
        "from spotspeed.staging.client import open_session\n"
        "def work(path):\n"
        "    open_session(path, rank=0, arena_bytes=1 << 20, slot_bytes=1 << 18).close()\n"
        "if __name__ == '__main__':\n"
        "    worker = multiprocessing.Process(target=work, args=(sys.argv[1],), daemon=True)\n"
        "    worker.start(); worker.join(); sys.exit(worker.exitcode)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "store")], cwd=ROOT, timeout=LIMIT_S,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_ranks_that_start_at_once_elect_one_saver(tmp_path: Path) -> None:
    script = (
        "import json, sys\n"
        "from spotspeed.staging.client import open_session\n"
        "session = open_session(sys.argv[1], rank=0, arena_bytes=1 << 20, slot_bytes=1 << 18)\n"
        "print(json.dumps(session.saver_pid), flush=True)\n"
        "sys.stdin.readline()\n"
        "session.close()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ))
            for _ in range(6)
        ]  # fmt: skip
        pids = {json.loads(rank.stdout.readline()) for rank in ranks if rank.stdout}
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write("\n")
            rank.stdin.flush()
            assert rank.wait(LIMIT_S) == 0
    assert len(pids) == 1
    wait_gone(pids.pop())


def _log(path: Path) -> Path:
    return log_directory() / f"{saver_address(str(path))}.log"


def _wait_logged(path: Path, text: str) -> None:
    """Wait until the saver of `path` has written `text` to its log."""
    log = _log(path)
    deadline = time.monotonic() + LIMIT_S
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline, f"{text!r} is not in {log}"
        time.sleep(0.01)
