"""A device that fails to read (EIO) is damage of what it holds; a store that is gone is not."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from spotspeed import events
from spotspeed.checkpoint.catalog import find, scan
from spotspeed.checkpoint.commit import roll_forward
from spotspeed.checkpoint.gc import collect
from spotspeed.checkpoint.ownership import claim_epoch, read_owner, record_restored_from
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.restore import Seat, restore_agreed
from spotspeed.core.manifest import MANIFEST_FILE
from spotspeed.core.retention import Keep
from spotspeed.errors import CorruptionError, StorageError, UnreadableError
from spotspeed.storage import posix
from spotspeed.storage.local import LocalStorage


@pytest.fixture
def bad_sectors(monkeypatch):
    """Names of files that the device fails to read: add to it, or take away."""
    names: set[str] = set()
    read = os.preadv

    def preadv(file: int, buffers, offset: int) -> int:
        if Path(os.readlink(f"/proc/self/fd/{file}")).name in names:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, buffers, offset)

    monkeypatch.setattr(posix.os, "preadv", preadv)
    return names


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADMSG, errno.EUCLEAN])
def test_a_failing_device_is_an_error_of_its_own_and_names_the_file(tmp_path, monkeypatch, number):
    storage = LocalStorage(tmp_path)
    storage.put("a/file", b"bytes")

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(posix.os, "preadv", fail)
    with pytest.raises(UnreadableError, match="a/file"):
        storage.get("a/file", 100)
    with pytest.raises(UnreadableError, match="a/file"):
        storage.read_into("a/file", 0, bytearray(5))


@pytest.mark.parametrize("file", ["rank-00001.shard", "rank-00001.receipt", MANIFEST_FILE])
def test_any_file_that_cannot_be_read_is_damage_that_names_it(
    checkpoint_factory, bad_sectors, file
):
    written = checkpoint_factory(2)
    bad_sectors.add(file)
    [damage] = CheckpointReader(written.storage, written.manifest).find_damage().damages
    assert file in str(damage) and "input/output error" in str(damage)
    with pytest.raises(CorruptionError, match=file):
        reader = CheckpointReader.open(written.storage, written.ticket.directory)
        reader.read_into([(written.fragment(key), bytearray(array.nbytes))
                          for key, (_, array) in written.tensors.items()])  # fmt: skip


def test_a_manifest_that_cannot_be_read_is_listed_as_damaged_and_never_removed(
    tmp_path, seal_small, monkeypatch
):
    storage = LocalStorage(tmp_path)
    claim_epoch(storage)
    record_restored_from(storage, 1, None)
    for step in (10, 20):
        newest = seal_small(storage, 1, step)
    inode = os.stat(tmp_path / newest.manifest_path).st_ino
    read = os.preadv

    def preadv(file: int, buffers, offset: int) -> int:
        if os.fstat(file).st_ino == inode:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, buffers, offset)

    monkeypatch.setattr(posix.os, "preadv", preadv)
    catalog = scan(storage)
    assert [info.step for info in catalog.sealed] == [10]
    [damaged] = catalog.damaged
    assert damaged.directory == newest.directory and "cannot be read" in damaged.cause
    assert roll_forward(storage).unsealed == ()
    assert collect(storage, Keep(1), epoch=1).removals == ()


@pytest.mark.parametrize("file", ["rank-00000.shard", "rank-00000.receipt", MANIFEST_FILE])
def test_a_link_in_a_files_place_is_damage_and_hides_no_other_checkpoint(
    tmp_path, seal_small, file
):
    storage = LocalStorage(tmp_path / "run")
    first, second = (seal_small(storage, 1, step) for step in (10, 20))
    place = tmp_path / "run" / second.directory / file
    place.rename(tmp_path / file)
    place.symlink_to(tmp_path / file)
    catalog = scan(storage)
    if file == MANIFEST_FILE:
        [damaged] = catalog.damaged
        assert file in damaged.cause and "symbolic link" in damaged.cause
        assert collect(storage, Keep(1), epoch=1).removals == ()
    else:
        opened = find(storage, second.directory)
        [damage] = CheckpointReader.open(storage, opened.directory).find_damage().damages
        assert file in str(damage) and "symbolic link" in str(damage)
    assert first.directory in [info.directory for info in catalog.sealed]


def test_records_of_owners_and_epochs_that_cannot_be_read_stop_no_launch(
    tmp_path, seal_small, bad_sectors
):
    storage = LocalStorage(tmp_path)
    claim_epoch(storage)
    record_restored_from(storage, 1, None)
    seal_small(storage, 1, 10)
    said: list[object] = []
    with heard(said):
        bad_sectors.update({"owner.json", "000001.restored.json", "rank-00000.receipt"})
        assert read_owner(storage).epoch == 1, "the epoch's own record says the same"
        assert [info.step for info in scan(storage).sealed] == [10]
        roll_forward(storage)
    assert any("owner.json" in str(event) for event in said)
    assert any("epoch 1" in str(event) for event in said)


@contextlib.contextmanager
def heard(said: list[object]) -> Iterator[None]:
    events.add_sink(said.append)
    yield
    events.remove_sink(said.append)


def alone(label: str, value: bytes) -> list[bytes]:
    """One rank is all ranks."""
    json.loads(value)
    return [value]


def test_another_checkpoint_in_the_place_of_one_that_was_marked_is_damage(tmp_path, seal_small):
    storage = LocalStorage(tmp_path)
    seal_small(storage, 1, 10)
    [found] = scan(storage).sealed
    seat = Seat(0, 1, alone, None, None)  # type: ignore[arg-type]
    with pytest.raises(CorruptionError, match=f"has the digest {found.digest}, expected 000"):
        restore_agreed(storage, seat, tag=found.directory, digest="0" * 64)


def test_a_store_that_is_gone_as_a_whole_is_neither_damage_nor_a_fresh_start(
    tmp_path, seal_small, monkeypatch
):
    storage = LocalStorage(tmp_path)
    seal_small(storage, 1, 10)

    def fail(*_: object, **__: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    seat = Seat(0, 1, alone, None, None)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(posix.os, "preadv", fail)
        with pytest.raises(CorruptionError, match="no checkpoint could be restored"):
            restore_agreed(storage, seat)
        patch.setattr("spotspeed.storage.local_tree.os.scandir", fail)
        with pytest.raises(StorageError, match="list"):
            restore_agreed(storage, seat)
