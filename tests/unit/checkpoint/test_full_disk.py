"""A disk that refuses at any moment of a save: the old checkpoint stays, the next save succeeds."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spotspeed.checkpoint.catalog import list_sealed, scan
from spotspeed.checkpoint.commit import try_seal
from spotspeed.checkpoint.gc import collect
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.shard import ShardWriter
from spotspeed.core.chunks import pack
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket
from spotspeed.core.retention import Keep
from spotspeed.errors import StorageError
from spotspeed.storage.contract import Storage
from spotspeed.storage.local import LocalStorage
from spotspeed.storage.posix import PosixDisk

CHUNK, SIZE = 4096, 11_000
CALLS = ("make_directory", "create_file", "write", "sync_file", "sync_directory", "rename", "link")
REFUSALS = {"ENOSPC": "no space is left", "EDQUOT": "quota", "EROFS": "read-only", "EIO": "device"}


class RefusingDisk(PosixDisk):
    """Counts the calls; from the `first` of one kind on that kind fails, until it is healed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._kind, self._first, self._number = "", 0, 0
        for name in CALLS:
            setattr(self, name, self._counted(name, getattr(self, name)))

    def refuse(self, kind: str, first: int, number: int) -> None:
        self.calls.clear()
        self._kind, self._first, self._number = kind, first, number

    def heal(self) -> None:
        self.refuse("", 0, 0)

    def _counted(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            self.calls[name] += 1
            if name == self._kind and self.calls[name] > self._first:
                raise OSError(self._number, os.strerror(self._number))
            return real(*arguments)

        return call


def ticket_of(step: int) -> Ticket:
    return Ticket(1, step, "a", f"step-{step}", "periodic", 1, 0)


def save(storage: Storage, step: int) -> None:
    """A save of one rank, as the saver makes it; every byte is the step."""
    fragment = Fragment(TensorKey("fp32", "w"), "uint8", (SIZE,), Interval(0, SIZE))
    layout = pack([fragment], chunk_bytes=CHUNK)
    with ShardWriter(storage, ticket_of(step), 0, layout) as writer:
        for chunk in layout.chunks:
            writer.put_chunk(chunk.index, bytes([step]) * chunk.size_bytes)
        writer.finish()
    assert try_seal(storage, ticket_of(step)) is not None


def check(storage: Storage, steps: list[int]) -> None:
    """Exactly these are sealed, newest first, and whole."""
    listed = list_sealed(storage)
    assert [info.step for info in listed] == steps
    assert scan(storage).damaged == ()
    for info in listed:
        reader = CheckpointReader.open(storage, info.directory, digest=info.digest)
        assert reader.verify().is_whole
        assert reader.read_tensor(TensorKey("fp32", "w")).tobytes() == bytes([info.step]) * SIZE


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("kind", CALLS)
def test_a_refusal_at_any_call_of_a_save_costs_that_save_alone(
    kind: str, name: str, tmp_path: Path
) -> None:
    disk = RefusingDisk()
    storage = LocalStorage(tmp_path, disk=disk)
    save(storage, 1)
    disk.heal()
    save(storage, 2)
    count = disk.calls[kind]
    assert count > 0
    known, step = [2, 1], 2
    for first in range(count):
        step += 1
        before = files(tmp_path)
        disk.refuse(kind, first, getattr(errno, name))
        is_sealed = True  # also where only the hint cannot be moved
        try:
            save(storage, step)
        except StorageError as error:
            assert REFUSALS[name] in str(error) and str(tmp_path) in str(error)
            disk.heal()
            # Perhaps everything is there but the last word of it, as after a crash.
            is_sealed = try_seal(storage, ticket_of(step)) is not None
        disk.heal()
        known = [step, *known] if is_sealed else known
        assert not [path for path in files(tmp_path) - before if ".tmp-" in path]
        check(storage, known)
    step += 1
    save(storage, step)
    check(storage, [step, *known])


@pytest.mark.parametrize("first", range(8))
def test_what_is_missing_is_said_in_bytes_and_given_back(first: int, tmp_path: Path) -> None:
    disk = RefusingDisk()
    storage = LocalStorage(tmp_path, disk=disk)
    save(storage, 1)
    before = files(tmp_path)
    disk.refuse("write", first, errno.ENOSPC)
    with pytest.raises(StorageError, match=r"rank-00000.*\d+ missing: no space") as caught:
        save(storage, 2)
    if first < 6:
        assert "bytes of this file are missing" in str(caught.value)
        assert files(tmp_path) == before, "the shard was not complete, so nothing is left"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_on_a_disk_with_any_room_left_a_save_succeeds_or_leaves_nothing(disk: Path) -> None:
    storage = LocalStorage(disk / "store")
    save(storage, 1)
    others, page = disk / "others", os.statvfs(disk).f_bsize
    outcomes: list[bool] = []
    while len(outcomes) < 30 and outcomes[-3:] != [True] * 3:
        room = len(outcomes) * page
        # Somebody else fills the disk up to that room.
        others.unlink(missing_ok=True)
        status = os.statvfs(disk)
        others.write_bytes(bytes(status.f_bavail * page - room))
        free = os.statvfs(disk).f_bavail
        step = 2 + len(outcomes)
        try:
            save(storage, step)
            outcomes.append(True)
        except StorageError as error:
            assert "no space is left" in str(error)
            outcomes.append(False)
            unfinished = [name for name in scan(storage).unsealed if f"{step:012d}." in name]
            for name in unfinished:  # as gc does once it knows that nobody will complete it
                storage.delete_prefix(name)
            assert os.statvfs(disk).f_bavail == free, "all of its space is given back"
        check(storage, [step, 1] if outcomes[-1] else [1])
        if outcomes[-1]:
            storage.delete_prefix(ticket_of(step).directory)
    assert outcomes[0] is False and outcomes[-3:] == [True] * 3, outcomes
    assert sorted(outcomes) == outcomes, "once the room is enough it stays enough"
    others.unlink()
    save(storage, 99)
    check(storage, [99, 1])


def test_a_full_disk_can_still_be_collected(disk: Path) -> None:
    storage = LocalStorage(disk / "store")
    for step in (1, 2, 3):
        save(storage, step)
    (disk / "others").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize))
    with pytest.raises(StorageError, match="no space"):
        save(storage, 4)
    assert len(collect(storage, Keep(1), epoch=1).removals) == 2
    save(storage, 5)
    check(storage, [5, 3])


@pytest.fixture
def thin_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that has less room than its file system believes, so that only fsync finds out."""
    below, place = tmp_path / "below", tmp_path / "thin"
    below.mkdir()
    place.mkdir()
    image = below / "image"
    with contextlib.ExitStack() as stack:
        for words in (
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(below)],
            ["truncate", "-s", "64M", str(image)],
            ["mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=1", str(image)],
            ["mount", "-o", "loop", str(image), str(place)],
        ):
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
            if words[0] == "mount":
                stack.callback(subprocess.run, ["umount", "-l", words[-1]], check=True)
        yield place


def test_what_only_fsync_finds_out_is_no_checkpoint(thin_disk: Path) -> None:
    storage = LocalStorage(thin_disk / "run")
    save(storage, 1)
    with storage.writer("shard") as writer:
        for _ in range(6):
            writer.write(os.urandom(1 << 22))
        with pytest.raises(StorageError, match=f"{6 << 22} missing"):
            writer.commit()
    assert [info.key for info in storage.list()] == [
        "latest.json", *(f"{ticket_of(1).directory}/{name}"
                         for name in ("manifest.json", "rank-00000.receipt", "rank-00000.shard")),
    ]  # fmt: skip
    check(storage, [1])
