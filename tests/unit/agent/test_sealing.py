"""Who waits for a seal gets it, learns that it will not come, or is let go."""

from __future__ import annotations

import errno
import queue
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from spotspeed.agent.incoming import IncomingSave
from spotspeed.agent.sealing import HopelessError, Sealer
from spotspeed.checkpoint.commit import LATEST_KEY, read_latest
from spotspeed.checkpoint.shard import ShardWriter
from spotspeed.core.chunks import StreamLayout, pack
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Manifest, Ticket
from spotspeed.core.saver_protocol import Begin
from spotspeed.errors import SpotSpeedError, StorageError
from spotspeed.storage.contract import ReadBuffer
from spotspeed.storage.local import LocalStorage
from tests.unit.agent.node_rig import until
from tests.unit.checkpoint.test_full_disk import RefusingDisk

TICKET = Ticket(1, 10, "a", "step-10", "periodic", 2, 0)
LIMIT_S = 30.0
Outcomes = queue.SimpleQueue[tuple[int, Manifest | SpotSpeedError]]


def _layout(rank: int) -> StreamLayout:
    key = TensorKey("fp32", "w", f"rank-{rank}")
    return pack([Fragment(key, "uint8", (8,), Interval(0, 8))], chunk_bytes=4096)


def _incoming(rank: int, ticket: Ticket) -> IncomingSave:
    return IncomingSave(Begin(1, ticket, rank, 4096, 1, 8, "", ()), _layout(rank))


def _write(storage: LocalStorage, rank: int, ticket: Ticket = TICKET) -> None:
    with ShardWriter(storage, ticket, rank, _layout(rank)) as writer:
        writer.put_chunk(0, bytes(8))
        writer.finish()


@pytest.fixture
def outcomes() -> Outcomes:
    return queue.SimpleQueue()


def _add(
    sealer: Sealer, rank: int, outcomes: Outcomes, *, is_wanted: bool = True,
    ticket: Ticket = TICKET, is_ordered: bool = False,
) -> IncomingSave:  # fmt: skip
    save = _incoming(rank, ticket)
    sealer.add(save, lambda save, outcome: outcomes.put((save.rank, outcome)),
               is_wanted=lambda: is_wanted, is_ordered=is_ordered)  # fmt: skip
    return save


def test_all_who_wait_get_the_same_manifest(tmp_path: Path, outcomes: Outcomes) -> None:
    storage = LocalStorage(tmp_path)
    sealer = Sealer(storage)
    _write(storage, 0)
    _add(sealer, 0, outcomes)
    _write(storage, 1)
    _add(sealer, 1, outcomes)
    results = dict(outcomes.get(timeout=LIMIT_S) for _ in range(2))
    assert set(results) == {0, 1}
    assert isinstance(results[0], Manifest) and results[0] == results[1]


class HeldStorage(LocalStorage):
    """Holds the writing of one key back until it is let go."""

    def __init__(self, root: Path, key: str) -> None:
        super().__init__(root)
        self._key = key
        self.began, self.let_go = threading.Event(), threading.Event()
        self.times = 0

    def _hold(self, key: str) -> None:
        if key == self._key:
            self.times += 1
            self.began.set()
            assert self.let_go.wait(LIMIT_S)

    def put(self, key: str, data: ReadBuffer) -> None:
        self._hold(key)
        super().put(key, data)

    def create(self, key: str, data: ReadBuffer) -> bool:
        self._hold(key)
        return super().create(key, data)


def test_nobody_is_told_before_the_hint_has_moved(tmp_path: Path, outcomes: Outcomes) -> None:
    storage = HeldStorage(tmp_path, LATEST_KEY)
    sealer = Sealer(storage)
    for rank in (0, 1):
        _write(storage, rank)
        _add(sealer, rank, outcomes)
    assert storage.began.wait(LIMIT_S)
    assert outcomes.empty()
    storage.let_go.set()
    for _ in range(2):
        manifest = outcomes.get(timeout=LIMIT_S)[1]
        assert isinstance(manifest, Manifest)
        # Whoever is told may remove or copy the folder at once.
        assert read_latest(storage) == (TICKET.directory, manifest.digest)


def test_a_hint_that_cannot_be_moved_ends_nothing(tmp_path: Path, outcomes: Outcomes) -> None:
    disk = RefusingDisk()
    storage = LocalStorage(tmp_path, disk=disk)
    sealer = Sealer(storage)
    for ticket in (TICKET, replace(TICKET, step=20)):
        for rank in (0, 1):
            _write(storage, rank, ticket)
        disk.refuse("rename", 0, errno.ENOSPC)
        _add(sealer, 0, outcomes, ticket=ticket)
        assert isinstance(outcomes.get(timeout=LIMIT_S)[1], Manifest)
        disk.heal()
    assert read_latest(storage) is None


def test_who_comes_while_it_is_being_sealed_does_not_seal_it_again(
    tmp_path: Path, outcomes: Outcomes
) -> None:
    storage = HeldStorage(tmp_path, TICKET.manifest_path)
    sealer = Sealer(storage)
    for rank in (0, 1):
        _write(storage, rank)
    _add(sealer, 0, outcomes)
    assert storage.began.wait(LIMIT_S)
    _add(sealer, 1, outcomes)
    storage.let_go.set()
    results = dict(outcomes.get(timeout=LIMIT_S) for _ in range(2))
    assert isinstance(results[0], Manifest) and results[0] == results[1]
    assert storage.times == 1


def test_who_comes_after_the_seal_needs_no_room_on_the_disk(
    tmp_path: Path, outcomes: Outcomes
) -> None:
    disk = RefusingDisk()
    storage = LocalStorage(tmp_path, disk=disk)
    sealer = Sealer(storage)
    for rank in (0, 1):
        _write(storage, rank)
    _add(sealer, 0, outcomes)
    _, first = outcomes.get(timeout=LIMIT_S)
    disk.refuse("create_file", 0, errno.ENOSPC)
    _add(sealer, 1, outcomes)
    assert outcomes.get(timeout=LIMIT_S) == (1, first)


def test_a_receipt_of_another_node_is_found_without_being_told(
    tmp_path: Path, outcomes: Outcomes
) -> None:
    storage = LocalStorage(tmp_path)
    sealer = Sealer(storage)
    _write(storage, 0)
    _add(sealer, 0, outcomes)
    _write(storage, 1)
    assert isinstance(outcomes.get(timeout=LIMIT_S)[1], Manifest)


def test_a_rank_that_cannot_complete_ends_the_waiting(tmp_path: Path, outcomes: Outcomes) -> None:
    storage = LocalStorage(tmp_path)
    sealer = Sealer(storage)
    _write(storage, 0)
    _add(sealer, 0, outcomes)
    sealer.broken(TICKET.directory, 1, "rank 1 failed: disk full")
    outcome = outcomes.get(timeout=LIMIT_S)[1]
    assert isinstance(outcome, HopelessError) and "rank 1 failed: disk full" in str(outcome)


def test_a_part_that_a_later_saver_may_bring_is_not_hopeless(
    tmp_path: Path, outcomes: Outcomes
) -> None:
    storage = LocalStorage(tmp_path)
    sealer = Sealer(storage)
    _write(storage, 0)
    sealer.broken(TICKET.directory, 1, "rank 1 failed: on this node only", is_final=False)
    _add(sealer, 0, outcomes)
    outcome = outcomes.get(timeout=LIMIT_S)[1]
    assert isinstance(outcome, StorageError) and not isinstance(outcome, HopelessError)


def test_a_rank_that_tries_again_is_waited_for(tmp_path: Path, outcomes: Outcomes) -> None:
    storage = LocalStorage(tmp_path)
    sealer = Sealer(storage)
    sealer.broken(TICKET.directory, 1, "rank 1 failed: its saver died")
    sealer.mended(TICKET.directory, 1)
    _write(storage, 0)
    _add(sealer, 0, outcomes)
    _write(storage, 1)
    assert isinstance(outcomes.get(timeout=LIMIT_S)[1], Manifest)


def test_an_older_save_is_hopeless_when_a_later_one_of_all_ranks_is_sealed(
    tmp_path: Path, outcomes: Outcomes
) -> None:
    """Another node has lost its part: nobody says so, but its later part comes after it."""
    storage = LocalStorage(tmp_path)
    sealer = Sealer(storage)
    lost, done, later = (replace(TICKET, step=step) for step in (8, 9, 20))
    for ticket in (lost, done, later):
        _write(storage, 0, ticket)
        _add(sealer, 0, outcomes, ticket=ticket, is_ordered=True)
    for ticket in (done, later):
        _write(storage, 1, ticket)
    found = [outcomes.get(timeout=LIMIT_S)[1] for _ in range(3)]
    assert {item.ticket.step for item in found if isinstance(item, Manifest)} == {9, 20}
    (hopeless,) = (item for item in found if isinstance(item, HopelessError))
    assert lost.directory in str(hopeless) and "are lost" in str(hopeless)


@pytest.mark.parametrize(("is_ordered", "reason"), [(False, "periodic"), (True, "notice")])
def test_a_later_save_that_may_have_overtaken_others_tells_nothing(
    tmp_path: Path, outcomes: Outcomes, is_ordered: bool, reason: str
) -> None:
    storage = LocalStorage(tmp_path)
    sealer = Sealer(storage)
    later = replace(TICKET, step=20, reason=reason)
    for ticket in (TICKET, later):
        _write(storage, 0, ticket)
        _add(sealer, 0, outcomes, ticket=ticket, is_ordered=is_ordered)
    _write(storage, 1, later)
    first = outcomes.get(timeout=LIMIT_S)[1]
    assert isinstance(first, Manifest) and first.ticket == later
    _write(storage, 1)
    second = outcomes.get(timeout=LIMIT_S)[1]
    assert isinstance(second, Manifest) and second.ticket == TICKET


def test_an_abandoned_save_is_not_waited_for(tmp_path: Path, outcomes: Outcomes) -> None:
    storage = LocalStorage(tmp_path)
    sealer = Sealer(storage)
    _write(storage, 0)
    save = _add(sealer, 0, outcomes)
    save.stop("the step was held too long")
    assert "held too long" in str(outcomes.get(timeout=LIMIT_S)[1])


def test_a_save_whose_rank_is_gone_does_not_keep_the_saver(
    tmp_path: Path, outcomes: Outcomes
) -> None:
    storage = LocalStorage(tmp_path)
    sealer = Sealer(storage)
    _write(storage, 0)
    orphan = _add(sealer, 0, outcomes, is_wanted=False)
    until(lambda: orphan.progress.is_settled)
    _write(storage, 1)
    _add(sealer, 1, outcomes)
    assert outcomes.get(timeout=LIMIT_S)[0] == 1, "the other was let go"


def test_a_store_that_fails_for_a_while_is_asked_again_although_the_rank_is_gone(
    tmp_path: Path, outcomes: Outcomes
) -> None:
    disk = RefusingDisk()
    storage = LocalStorage(tmp_path, disk=disk)
    for rank in (0, 1):
        _write(storage, rank)
    disk.refuse("create_file", 0, errno.ENOSPC)
    save = _add(Sealer(storage), 1, outcomes, is_wanted=False)
    until(lambda: disk.calls["create_file"] >= 3)
    assert not save.progress.is_settled, "so the saver stays"
    disk.heal()
    assert isinstance(outcomes.get(timeout=LIMIT_S)[1], Manifest)


def test_receipts_that_contradict_each_other_are_an_error(
    tmp_path: Path, outcomes: Outcomes
) -> None:
    storage = LocalStorage(tmp_path)
    sealer = Sealer(storage)
    _write(storage, 0)
    _write(storage, 1)
    storage.put(TICKET.receipt_path(1), storage.get(TICKET.receipt_path(0), 1 << 20))
    _add(sealer, 0, outcomes)
    assert "rank-00001.receipt" in str(outcomes.get(timeout=LIMIT_S)[1])
