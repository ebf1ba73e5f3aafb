"""The node's own disk: written first, drained in the background, never the reason of a failure."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from spotspeed.agent.draining import Drain, Drainer
from spotspeed.agent.incoming import IncomingSave
from spotspeed.checkpoint.catalog import list_sealed
from spotspeed.checkpoint.ownership import claim_epoch, record_restored_from
from spotspeed.checkpoint.tiers import node_root, survey
from spotspeed.errors import StorageError
from spotspeed.storage.contract import Storage, Writer
from spotspeed.storage.local import LocalStorage
from tests.unit.agent.node_rig import (
    CHUNK,
    CHUNKS,
    LIMIT_S,
    Node,
    check,
    next_saver,
    node_path,
    ticket_of,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def local_path(tmp_path: Path) -> Path:
    return tmp_path / "nvme"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 19 MiB, of which 16 are left to others: 3 MiB, less than a save of 4."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=19m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_part_comes_to_the_store_byte_for_byte(path: Path, local_path: Path) -> None:
    node, ticket = Node(path, local_path), ticket_of(1)
    save, part = node.store(ticket)
    assert part is not None and not path.exists()
    node.tier.drain(part, save, node.outcomes.put)
    assert node.outcomes.get(timeout=LIMIT_S) is None
    for key in (ticket.shard_path(0), ticket.receipt_path(0)):
        assert (path / key).read_bytes() == (node_path(node) / key).read_bytes()


def test_a_part_that_there_is_no_time_to_write_twice_goes_past_the_disk(
    path: Path, local_path: Path
) -> None:
    node, ticket = Node(path, local_path), ticket_of(1, reason="notice")
    save, part = node.store(ticket, is_direct=True)
    assert part is None and node.bypassed == []
    assert (path / ticket.receipt_path(0)).exists()
    assert survey(node.tier.node) == []
    assert save.cost is not None and not save.cost.is_near


def test_what_a_part_took_is_told_of_the_disk_and_of_the_way_to_the_store(
    path: Path, local_path: Path
) -> None:
    node = Node(path, local_path)
    save, part = node.store(ticket_of(1))
    assert part is not None and save.cost is not None
    assert save.cost.is_near and save.cost.write_s > 0 and save.cost.encode_s > 0
    assert save.cost.raw_bytes == CHUNKS * CHUNK <= save.cost.stored_bytes == part.size_bytes
    node.tier.drain(part, save, node.outcomes.put)
    assert node.outcomes.get(timeout=LIMIT_S) is None
    assert save.progress.drained_s > 0


def test_the_newest_sealed_checkpoint_stays_on_the_node_and_older_ones_go(
    path: Path, local_path: Path
) -> None:
    node = Node(path, local_path)
    for step in (1, 2, 3):
        node.save(ticket_of(step))
    node.tier.close()
    found = survey(node.tier.node)
    assert [(item.directory, item.is_sealed) for item in found] == [(ticket_of(3).directory, True)]
    assert [info.step for info in list_sealed(LocalStorage(path))] == [3, 2, 1]


def test_what_is_not_at_the_store_yet_outlasts_newer_checkpoints(
    path: Path, local_path: Path
) -> None:
    node = Node(path, local_path)
    _, part = node.store(ticket_of(1))
    assert part is not None
    node.save(ticket_of(2))
    node.tier.close()
    assert node.held() == [ticket_of(1).directory, ticket_of(2).directory]


def test_a_disk_without_room_is_not_used(path: Path, small_disk: Path) -> None:
    node, ticket = Node(path, small_disk), ticket_of(1)
    node.save(ticket)
    assert "bytes are needed" in node.bypassed[0]
    check(path, ticket)


@pytest.mark.parametrize("slots", [CHUNKS, 4], ids=["still in memory", "memory given back"])
def test_a_disk_that_fills_up_in_mid_save_costs_nothing(
    path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    monkeypatch.setattr("spotspeed.agent.node_tier.SPARE_BYTES", 0)
    node, ticket = Node(path, small_disk), ticket_of(1)
    node.tier.open()
    # The room is taken by somebody else once it has been found to be enough.
    reserve = node.tier.sink

    def sink_then_fill(save: IncomingSave) -> object:
        room = reserve(save)
        (small_disk / "others").write_bytes(bytes((19 << 20) - 9 * CHUNK))
        return room

    monkeypatch.setattr(node.tier, "sink", sink_then_fill)
    node.save(ticket, slots=slots)
    assert "no space is left" in node.bypassed[0] and len(node.bypassed) == 1
    check(path, ticket)
    assert not list(node_path(node).rglob("*.shard"))


def test_chunks_that_cannot_be_read_back_are_never_moved(
    path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spotspeed.agent.node_tier.SPARE_BYTES", 0)
    node, ticket = Node(path, small_disk), ticket_of(1)
    node.tier.open()
    reserve = node.tier.sink

    def sink_then_fill(save: IncomingSave) -> object:
        room = reserve(save)
        (small_disk / "others").write_bytes(bytes((19 << 20) - 9 * CHUNK))
        read_back = room.read_back

        def damaged(offset: int, buffer: memoryview) -> None:
            read_back(offset, buffer)
            buffer[7] ^= 1

        monkeypatch.setattr(room, "read_back", damaged)
        return room

    monkeypatch.setattr(node.tier, "sink", sink_then_fill)
    with pytest.raises(StorageError, match="cannot be read back"):
        node.store(ticket, slots=4)
    assert not [file for file in path.rglob("*") if file.is_file()]


def test_what_a_dead_saver_left_is_drained_and_sealed_by_thenext_saver(
    path: Path, local_path: Path
) -> None:
    first = Node(path, local_path)
    for step in (1, 2):
        assert first.store(ticket_of(step))[1] is not None
    second = next_saver(first, path, local_path)
    second.tier.open()
    assert [save.directory for save in second.house.saves] == [
        ticket_of(step).directory for step in (1, 2)
    ]  # fmt: skip
    # The older one may find itself overtaken, and is dropped then.
    assert second.house.wait() in (["sealed", "sealed"], ["stored", "sealed"])
    check(path, ticket_of(2))
    second.tier.close()
    assert node_path(second).joinpath(ticket_of(2).directory, "sealed.json").exists()


def test_what_was_left_is_known_to_be_at_the_store_already(path: Path, local_path: Path) -> None:
    first = Node(path, local_path)
    first.save(ticket_of(1))
    first.tier.close()
    mark = node_path(first) / ticket_of(1).directory / "sealed.json"
    mark.unlink()
    before = (path / ticket_of(1).shard_path(0)).stat().st_mtime_ns
    second = next_saver(first, path, local_path)
    second.tier.open()
    assert second.house.wait() == ["sealed"]
    assert (path / ticket_of(1).shard_path(0)).stat().st_mtime_ns == before
    second.tier.close()
    assert mark.exists()


def test_a_damaged_leftover_is_reported_and_not_sealed(path: Path, local_path: Path) -> None:
    first = Node(path, local_path)
    first.store(ticket_of(1))
    shard = node_path(first) / ticket_of(1).shard_path(0)
    data = bytearray(shard.read_bytes())
    data[4096 + 3 * CHUNK + 1] ^= 1
    shard.write_bytes(data)
    second = next_saver(first, path, local_path)
    second.tier.open()
    assert second.house.wait() == ["failed"]
    assert list_sealed(LocalStorage(path)) == []
    assert not [file for file in path.rglob("*") if file.is_file()]


def test_a_save_that_a_later_launch_has_left_behind_is_not_drained(
    path: Path, local_path: Path
) -> None:
    first = Node(path, local_path)
    first.save(ticket_of(1))
    first.store(ticket_of(9))
    storage = LocalStorage(path)
    for epoch in (1, 2):
        assert claim_epoch(storage).epoch == epoch
    record_restored_from(storage, 2, ticket_of(1).directory)
    second = next_saver(first, path, local_path)
    second.tier.open()
    assert second.house.wait() == ["stored"]
    assert not (path / ticket_of(9).directory).exists()
    assert not list((node_path(second) / ticket_of(9).directory).glob("rank*"))


def test_a_save_cut_short_by_a_crash_leaves_nothing_on_the_node(
    path: Path, local_path: Path
) -> None:
    first = Node(path, local_path)
    first.store(ticket_of(1))
    (node_path(first) / ticket_of(1).receipt_path(0)).unlink()
    second = next_saver(first, path, local_path)
    second.tier.open()
    assert second.house.saves == [] and second.held() == []


def test_a_tier_that_another_saver_holds_is_left_alone(path: Path, local_path: Path) -> None:
    first = Node(path, local_path)
    first.tier.open()
    other = Node(path, local_path)
    with pytest.raises(StorageError, match="in use by another saver"):
        other.tier.open()
    other.save(ticket_of(1))
    assert "in use by another saver" in other.bypassed[0]
    check(path, ticket_of(1))


def test_while_the_store_is_away_parts_wait_on_the_node(path: Path, local_path: Path) -> None:
    path.write_text("no directory")
    node, ticket = Node(path, local_path), ticket_of(1)
    save, part = node.store(ticket)
    assert part is not None
    node.tier.drain(part, save, node.outcomes.put)
    assert node.tier._drainer._drains[0].is_urgent is False
    assert save.progress.state == "arriving" and node.outcomes.empty()
    path.unlink()
    assert node.outcomes.get(timeout=LIMIT_S) is None
    assert (path / ticket.receipt_path(0)).exists()


def test_a_store_that_stays_away_is_given_up_and_the_part_stays(
    path: Path, local_path: Path
) -> None:
    path.write_text("no directory")
    node, ticket = Node(path, local_path), ticket_of(1)
    save, part = node.store(ticket)
    assert part is not None
    drainer = Drainer(node.tier.node, LocalStorage(path), give_up_s=0.05)
    drainer.add(Drain(part, save, node.outcomes.put))
    error = node.outcomes.get(timeout=LIMIT_S)
    assert isinstance(error, StorageError) and "durable on this node only" in str(error)
    assert node.held() == [ticket.directory]


class GatedStorage:
    """A store whose writers wait, before each piece, until the gate is open."""

    def __init__(self, inner: Storage) -> None:
        self._inner = inner
        self.gate = threading.Event()
        self.written: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def writer(self, key: str) -> Writer:
        return _GatedWriter(self, self._inner.writer(key), key)


class _GatedWriter:
    def __init__(self, storage: GatedStorage, inner: Writer, key: str) -> None:
        self._storage, self._inner, self._key = storage, inner, key

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def __enter__(self) -> _GatedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._inner.abort()

    def write(self, buffer: memoryview) -> None:
        assert self._storage.gate.wait(LIMIT_S)
        self._inner.write(buffer)

    def commit(self) -> None:
        self._inner.commit()
        self._storage.written.append(self._key)


def test_a_notice_s_save_overtakes_those_that_nobody_waits_for(
    path: Path, local_path: Path
) -> None:
    slow = GatedStorage(LocalStorage(path))
    node = Node(slow, local_path)  # type: ignore[arg-type]
    tickets = [ticket_of(step) for step in range(1, 7)] + [ticket_of(7, reason="notice")]
    for ticket in tickets:
        save, part = node.store(ticket)
        assert part is not None
        node.tier.drain(part, save, node.outcomes.put)
    slow.gate.set()
    for _ in tickets:
        assert node.outcomes.get(timeout=LIMIT_S) is None
    assert slow.written[0] == tickets[-1].shard_path(0)


def test_the_measured_speed_of_the_store_is_known_after_the_first_part(
    path: Path, local_path: Path
) -> None:
    node = Node(path, local_path)
    assert node.tier.bytes_per_s is None
    node.save(ticket_of(1))
    assert node.tier.bytes_per_s is not None and node.tier.bytes_per_s > 0


def test_two_stores_share_one_disk_without_meeting(tmp_path: Path, local_path: Path) -> None:
    roots = {node_root(str(local_path), str(tmp_path / name)) for name in ("one", "other")}
    assert len(roots) == 2
    linked = tmp_path / "link"
    linked.symlink_to(tmp_path / "one")
    assert node_root(str(local_path), str(linked)) in roots


def test_the_lock_is_gone_with_its_holder(path: Path, local_path: Path) -> None:
    first = Node(path, local_path)
    first.tier.open()
    next_saver(first, path, local_path).tier.open()
    shutil.rmtree(local_path)
