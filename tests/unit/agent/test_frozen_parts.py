"""Parts that wait on a node while the frozen objects that they refer to lie at the store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spotspeed.checkpoint.catalog import list_sealed
from spotspeed.checkpoint.commit import try_seal
from spotspeed.checkpoint.gc import collect
from spotspeed.checkpoint.ownership import claim_epoch, record_restored_from
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.shard import ShardWriter
from spotspeed.checkpoint.sweep import Sweeper
from spotspeed.codec import digest
from spotspeed.core.chunks import pack
from spotspeed.core.frozen import ObjectRecord, content_of
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.lineage import Place
from spotspeed.core.manifest import Ticket
from spotspeed.core.owner import Identity
from spotspeed.core.retention import Keep
from spotspeed.storage.contract import Storage
from spotspeed.storage.local import LocalStorage
from tests.unit.agent.node_rig import Node, ticket_of

WHO = Identity("node", "boot", "pid:[1]", 1, 1)
SIZE = 40_000


def fragment(kind: str) -> Fragment:
    return Fragment(TensorKey(kind, "w"), "uint8", (SIZE,), Interval(0, SIZE))


def freeze(storage: Storage, ticket: Ticket) -> ObjectRecord:
    """The frozen weight, whose content is the step of `ticket`."""
    data = bytes([ticket.step]) * SIZE
    content = content_of([(fragment("weight"), digest(data))])
    layout = pack([fragment("weight")], chunk_bytes=1 << 16)
    with ShardWriter(storage, ticket, 0, layout, content=content) as writer:
        writer.put_chunk(0, data)
        return writer.finish_object()


def write(storage: Storage, ticket: Ticket, *objects: ObjectRecord) -> None:
    layout = pack([fragment("fp32")], chunk_bytes=1 << 16)
    with ShardWriter(storage, ticket, 0, layout) as writer:
        writer.put_chunk(0, bytes([ticket.step]) * SIZE)
        writer.finish(objects)


@pytest.fixture
def store(tmp_path: Path) -> LocalStorage:
    store = LocalStorage(tmp_path / "store")
    claim_epoch(store, identity=WHO)
    record_restored_from(store, 1, None)
    return store


@pytest.fixture
def local_path(tmp_path: Path) -> Path:
    return tmp_path / "nvme"


def left_by_a_saver(store: LocalStorage, local_path: Path, ticket: Ticket) -> None:
    """A part that its saver kept on this node; its frozen object is at the store."""
    node = Node(store, local_path)
    node.tier.open()
    write(node.tier.node, ticket, freeze(store, ticket))
    os.close(node.tier._lock_file)  # as its death does


def sweep(store: LocalStorage, sweeper: Sweeper, epoch: int, step: int) -> tuple[str, ...]:
    """Seal something newer that refers to nothing, and collect as the saver of `epoch` does."""
    ticket = ticket_of(step, epoch=epoch)
    write(store, ticket)
    assert try_seal(store, ticket) is not None
    return collect(store, Keep(9), epoch=epoch, sweeper=sweeper).frozen


def test_what_the_next_launch_on_the_node_finds_is_complete(
    store: LocalStorage, local_path: Path
) -> None:
    ticket = ticket_of(5)
    left_by_a_saver(store, local_path, ticket)
    node = Node(store, local_path)
    # The launch waits for this before it claims its epoch; so nothing newer can be sealed before.
    node.tier.open()
    assert node.house.wait() == ["sealed"]
    (info,) = list_sealed(store)
    reader = CheckpointReader.open(store, info.directory)
    assert reader.verify().is_whole
    assert reader.read_tensor(TensorKey("weight", "w")).tobytes() == bytes([5]) * SIZE


def test_nothing_that_a_part_on_its_way_needs_is_swept(
    store: LocalStorage, local_path: Path
) -> None:
    ticket = ticket_of(5)
    left_by_a_saver(store, local_path, ticket)
    in_flight = Sweeper(store, is_patient=True, is_quiet=lambda: False)
    # Newer saves overtake it, as that of a notice does.
    assert [sweep(store, in_flight, 1, step) for step in (6, 7, 8)] == [()] * 3
    assert len(store.list("frozen")) == 1


def test_a_part_whose_object_was_swept_elsewhere_is_refused_and_dropped(
    store: LocalStorage, local_path: Path
) -> None:
    ticket = ticket_of(5, reason="explicit")
    left_by_a_saver(store, local_path, ticket)
    # The job goes on elsewhere, without this node and without what it had.
    claim_epoch(store, identity=WHO, take_over=True)
    record_restored_from(store, 2, None)
    sweeper = Sweeper(store, is_patient=True)
    assert sweep(store, sweeper, 2, 6) == ()
    assert len(sweep(store, sweeper, 2, 7)) == 1
    before = store.list()
    node = Node(store, local_path)
    node.tier.open()
    assert node.house.wait() == ["failed"]
    assert store.list() == before
    assert node.tier.node.list(ticket.directory) == []
    assert [Place(info.epoch, info.step) for info in list_sealed(store)] == [
        Place(2, 7), Place(2, 6),
    ]  # fmt: skip
