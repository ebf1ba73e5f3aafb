"""The saver process, with real processes that die at the worst moments."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spotspeed.agent.process import NICE
from spotspeed.checkpoint.ownership import read_owner
from spotspeed.staging.client import find_saver
from spotspeed.staging.launch import saver_address
from spotspeed.storage.local import LocalStorage
from tests.distributed.drivers.saver_rank import ticket_of
from tests.distributed.saver_ranks import (
    RankProcess,
    check_sealed,
    stopped,
    wait_gone,
)

SMALL = {"count": 4, "elements": 1 << 16}
"""1 MiB of state."""
LARGE = {"count": 8, "elements": 1 << 20}
"""32 MiB of state: many times the smallest pool, which is four slots of 256 KiB."""
SMALL_POOL_GB = 0.0012


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A store; the test leaves no saver behind for it."""
    yield tmp_path / "store"
    session = find_saver(str(tmp_path / "store"))
    if session is not None:
        pid = session.saver_pid
        session.close()
        wait_gone(pid, 10)


def test_a_rank_killed_after_staging_loses_nothing(path: Path) -> None:
    with RankProcess(path) as rank:
        saver = rank.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        with stopped(saver):
            # Everything that the rank said is in the socket only, when it dies.
            rank.ask("stage", step=3, **SMALL)
            assert rank.ask("wait_staged", step=3)["staged"]
            rank.kill()
        wait_gone(saver)
    check_sealed(path, 3, world_size=1, **SMALL)


def test_the_saver_yields_to_the_training_as_a_session_until_a_notice_comes(path: Path) -> None:
    with RankProcess(path) as rank:
        saver = rank.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        group = Path(f"/proc/{saver}/autogroup")
        if not group.exists():
            pytest.skip("this kernel does not share cores among sessions (autogroup)")
        assert group.read_text().split()[-1] == str(NICE)
        for step, reason, niceness in ((1, "periodic", NICE), (2, "notice", 0)):
            rank.ask("stage", step=step, reason=reason, **SMALL)
            assert "digest" in rank.ask("result", step=step)
            assert group.read_text().split()[-1] == str(niceness)


def test_a_rank_killed_while_staging_leaves_no_receipt_and_no_file(path: Path) -> None:
    with RankProcess(path, host_memory_gb=SMALL_POOL_GB) as rank:
        saver = rank.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        with stopped(saver):
            rank.ask("stage", step=3, **LARGE)
            assert rank.ask("wait_full")["free"] == 0
            rank.kill()
        wait_gone(saver)
    assert [file for file in path.rglob("*") if file.is_file()] == []


def test_a_killed_saver_fails_its_saves_and_the_next_save_works(path: Path) -> None:
    with RankProcess(path) as rank:
        first = rank.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        with stopped(first):
            rank.ask("stage", step=1, **SMALL)
            rank.ask("wait_staged", step=1)
            os.kill(first, signal.SIGKILL)
        answer = rank.ask("result", step=1)
        assert answer["error"] == "StorageError"
        assert f"saver process {first} died" in answer["text"]
        rank.ask("stage", step=2, **SMALL)
        assert "digest" in rank.ask("result", step=2)
        facts = rank.ask("facts")
        assert facts["saver_pid"] != first
        assert sum(event.startswith(f"lost what=saver process {first}") for event in
                   facts["events"]) == 1  # fmt: skip
    check_sealed(path, 2, world_size=1, **SMALL)


def test_a_part_that_was_lost_with_a_saver_fails_the_save_for_all(path: Path) -> None:
    """Rank 1 gives its part to the next saver, which has never heard of rank 0's."""
    with RankProcess(path, 0, 2) as first, RankProcess(path, 1, 2) as second:
        saver = first.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        with stopped(saver):
            first.ask("stage", step=1, **SMALL)
            first.ask("wait_staged", step=1)
            os.kill(saver, signal.SIGKILL)
        assert "died" in first.ask("result", step=1)["text"]
        # Whichever saver comes next is told, also when it is not the first after the loss.
        next_saver = second.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        os.kill(next_saver, signal.SIGKILL)
        wait_gone(next_saver)
        second.ask("stage", step=1, **SMALL)
        answer = second.ask("result", step=1)
        assert answer["error"] == "StorageError" and "rank 0 failed" in answer["text"]
        for rank in (first, second):
            rank.ask("stage", step=2, **SMALL)
        assert first.ask("result", step=2) == second.ask("result", step=2)
    check_sealed(path, 2, world_size=2, **SMALL)


def test_a_saver_killed_in_mid_staging_does_not_block_the_training(path: Path) -> None:
    with RankProcess(path, host_memory_gb=SMALL_POOL_GB) as rank:
        first = rank.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        with stopped(first):
            rank.ask("stage", step=1, **LARGE)
            rank.ask("wait_full")
            rank.tell("wait_staged", step=1)
            os.kill(first, signal.SIGKILL)
        assert "died" in rank.answer()["text"]
        rank.ask("stage", step=2, **LARGE)
        assert "digest" in rank.ask("result", step=2)


def test_two_ranks_share_one_saver_and_the_last_one_seals(path: Path) -> None:
    with RankProcess(path, 0, 2) as first, RankProcess(path, 1, 2) as second:
        pids = {rank.ask("reserve", size_bytes=1 << 20)["saver_pid"] for rank in (first, second)}
        assert len(pids) == 1
        first.ask("stage", step=4, **SMALL)
        assert "error" not in first.ask("stored", step=4)
        assert not (path / ticket_of(4, 2).manifest_path).exists()
        second.ask("stage", step=4, **SMALL)
        assert first.ask("result", step=4) == second.ask("result", step=4)
    check_sealed(path, 4, world_size=2, **SMALL)


def test_a_rank_that_dies_while_staging_fails_the_save_of_its_neighbours(path: Path) -> None:
    small_pool = {"host_memory_gb": SMALL_POOL_GB}
    with RankProcess(path, 0, 2) as first, RankProcess(path, 1, 2, **small_pool) as second:
        saver = first.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        second.ask("reserve", size_bytes=1 << 20)
        first.ask("stage", step=4, **SMALL)
        first.ask("stored", step=4)
        with stopped(saver):
            second.ask("stage", step=4, **LARGE)
            second.ask("wait_full")
            second.kill()
        assert "rank 1 failed" in first.ask("result", step=4)["text"]


def test_a_pool_smaller_than_the_state_only_takes_longer(path: Path) -> None:
    with RankProcess(path, host_memory_gb=SMALL_POOL_GB) as rank:
        facts = rank.ask("reserve", size_bytes=1 << 20)
        assert facts["slots"] == 4
        (reserved,) = [event for event in facts["events"] if event.startswith("reserved")]
        assert f"size_bytes={facts['arena_bytes']} " in reserved
        assert "staging.host_memory_gb, divided among 1 ranks" in reserved
        before = _arena_bytes(facts["saver_pid"])
        for step in range(3):
            rank.ask("stage", step=step, **LARGE)
            assert "digest" in rank.ask("result", step=step)
        assert before == _arena_bytes(facts["saver_pid"]) == facts["arena_bytes"] < 2 << 20
        assert any(event.startswith("stalled") for event in rank.ask("facts")["events"])
    check_sealed(path, 2, world_size=1, **LARGE)


def test_an_abandoned_save_leaves_nothing_and_returns_its_slots(path: Path) -> None:
    with RankProcess(path, host_memory_gb=SMALL_POOL_GB) as rank:
        saver = rank.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        with stopped(saver):
            rank.ask("stage", step=1, **LARGE)
            rank.ask("wait_full")
            rank.ask("abandon", step=1)
        assert "abandoned" in rank.ask("result", step=1)["text"]
        rank.ask("stage", step=2, **LARGE)
        assert "digest" in rank.ask("result", step=2)
        facts = rank.ask("facts")
        assert facts["free"] == facts["slots"] == 4
    assert not list(path.glob("step-000000000001*/*"))


def test_a_forked_child_of_a_dead_rank_does_not_keep_its_session(path: Path) -> None:
    with RankProcess(path) as rank:
        saver = rank.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        child = rank.ask("fork_child")["child"]
        try:
            assert _arena_bytes(rank.process.pid) > 0
            assert _arena_bytes(child) == 0, "it would keep the pool's memory"
            rank.ask("stage", step=1, **SMALL)
            rank.ask("wait_staged", step=1)
            rank.kill()
            wait_gone(saver, 20)
        finally:
            os.kill(child, signal.SIGKILL)
    check_sealed(path, 1, world_size=1, **SMALL)


def test_the_saver_leaves_within_seconds_and_nothing_of_it_stays(path: Path) -> None:
    with RankProcess(path) as rank:
        saver = rank.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        rank.ask("stage", step=1, **SMALL)
        # Memory without a name cannot be left behind, whoever is killed.
        for process in (saver, rank.process.pid):
            assert "/dev/shm/" not in Path(f"/proc/{process}/maps").read_text()
        rank.ask("result", step=1)
        rank.ask("close")
        wait_gone(saver, 6)
    assert find_saver(str(path)) is None
    log = Path(f"/tmp/spotspeed-{os.getuid()}") / f"{saver_address(str(path))}.log"
    assert not log.exists()
    names = {file.name for file in path.rglob("*") if file.is_file()}
    assert names == {"rank-00000.shard", "rank-00000.receipt", "manifest.json", "latest.json"}


def niceness(task: Path) -> int:
    """Of a thread, from its directory below /proc."""
    return int((task / "stat").read_text().rpartition(")")[2].split()[16])


def test_the_saver_is_a_process_of_its_own(path: Path) -> None:
    with RankProcess(path) as rank:
        saver = rank.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(saver, number)
        status = Path(f"/proc/{saver}/stat").read_text().rpartition(")")[2].split()
        parent, group, session = (int(field) for field in status[1:4])
        assert rank.process.pid not in (parent, group, session)
        assert session == os.getsid(saver) != os.getsid(rank.process.pid)
        rank.ask("stage", step=1, **SMALL)
        rank.ask("result", step=1)
        assert max(niceness(task) for task in Path(f"/proc/{saver}/task").iterdir()) >= 5
        assert os.readlink(f"/proc/{saver}/cwd") == "/"
        assert not re.search(r"libtorch|deepspeed", Path(f"/proc/{saver}/maps").read_text())
        targets = [os.readlink(f"/proc/{saver}/fd/{number}") for number in (0, 1, 2)]
        assert targets[:2] == ["/dev/null"] * 2
        assert targets[2].endswith(".log")
        environment = Path(f"/proc/{saver}/environ").read_bytes()
        assert not re.search(rb"(?m)^(OMPI|PMIX|PMI|PRTE)_", environment.replace(b"\0", b"\n"))
        rank.ask("stage", step=1, **SMALL)
        assert "digest" in rank.ask("result", step=1)


def test_the_next_launch_waits_for_what_the_last_one_left(path: Path) -> None:
    with RankProcess(path) as rank:
        saver = rank.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        rank.ask("stage", step=1, **LARGE)
        rank.ask("wait_staged", step=1)
        rank.kill()
    session = find_saver(str(path))
    assert session is not None and session.saver_pid == saver
    drained = session.drain(2, timeout_s=30)
    assert drained.sealed == (ticket_of(1, 1).directory,)
    session.close()
    check_sealed(path, 1, world_size=1, **LARGE)


def test_no_temporary_file_survives_an_orderly_end(path: Path) -> None:
    with RankProcess(path) as rank:
        saver = rank.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        for step in range(4):
            rank.ask("stage", step=step, **SMALL)
        rank.ask("result", step=3)
        rank.kill()
        wait_gone(saver)
    storage = LocalStorage(path)
    assert len(storage.list("")) == 4 * 3 + 1
    assert sum(file.is_file() for file in path.rglob("*")) == 4 * 3 + 1


def await_renewals(storage: LocalStorage) -> None:
    """Return when the owner record has been counted up three times from now on."""
    first, deadline = read_owner(storage), time.monotonic() + 30
    assert first is not None
    while (owner := read_owner(storage)) is None or owner.counter < first.counter + 3:
        assert time.monotonic() < deadline, "the record is not renewed"
        time.sleep(0.02)


def test_the_saver_shows_that_the_owner_lives_and_then_that_it_is_alone(path: Path) -> None:
    storage = LocalStorage(path)
    with RankProcess(path) as rank:
        saver = rank.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        epoch = rank.ask("claim")["epoch"]
        first = read_owner(storage)
        assert first is not None and (first.epoch, first.state) == (epoch, "training")
        await_renewals(storage)
        # Without a save: the next may be far away, and others must not take the path over.
        os.kill(saver, signal.SIGKILL)
        wait_gone(saver)
        await_renewals(storage)
        second = rank.ask("facts")["saver_pid"]
        assert second != saver
        rank.kill()
        wait_gone(second)
    last = read_owner(storage)
    assert last is not None and (last.epoch, last.state) == (epoch, "draining")


@pytest.fixture
def other_node() -> list[str]:
    """A command prefix that puts a process where it cannot see this network's sockets."""
    prefix = ["unshare", "--net"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs the right to make a network namespace")
    return prefix


def test_the_savers_of_two_nodes_seal_one_checkpoint(path: Path, other_node: list[str]) -> None:
    with RankProcess(path, 0, 2) as here, RankProcess(path, 1, 2, prefix=other_node) as there:
        savers = [rank.ask("reserve", size_bytes=1 << 20)["saver_pid"] for rank in (here, there)]
        assert savers[0] != savers[1]
        here.ask("stage", step=1, **SMALL)
        here.ask("stored", step=1)
        there.ask("stage", step=1, **SMALL)
        assert here.ask("result", step=1) == there.ask("result", step=1)
        # Then a node whose rank and saver are gone, before the other one is ready.
        here.ask("stage", step=2, **SMALL)
        here.ask("wait_staged", step=2)
        here.kill()
        wait_gone(savers[0])
        there.ask("stage", step=2, **SMALL)
        assert "digest" in there.ask("result", step=2)
        there.kill()
        wait_gone(savers[1])
    check_sealed(path, 2, world_size=2, **SMALL)


def _arena_bytes(pid: int) -> int:
    """Bytes of shared arenas that process `pid` maps."""
    total = 0
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "spotspeed-arena" in line:
            start, stop = (int(end, 16) for end in line.split()[0].split("-"))
            total += stop - start
    return total
