"""What is particular to a directory: links, hidden names, failures of the disk, the root."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from spotspeed.errors import (
    ConfigError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
)
from spotspeed.storage import open_storage, posix
from spotspeed.storage.local import LocalStorage
from spotspeed.storage.posix import PosixDisk


class FailingDisk(PosixDisk):
    """A disk on which one kind of call fails, after so many that succeed."""

    def __init__(self, call: str, number: int, after: int = 0) -> None:
        super().__init__()
        self._left = after
        real: Callable[..., object] = getattr(self, call)

        def fail(*arguments: object) -> object:
            if self._left:
                self._left -= 1
                return real(*arguments)
            raise OSError(number, os.strerror(number))

        setattr(self, call, fail)


def leftovers(root: Path) -> list[str]:
    return [str(path) for path in root.rglob("*") if path.is_file()]


def test_a_root_that_does_not_exist_is_created_by_the_first_write_only(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    storage = LocalStorage(root)
    assert storage.list() == []
    storage.delete("x")
    storage.delete_prefix("x")
    assert not (tmp_path / "a").exists()
    storage.put("x", b"1")
    assert (root / "x").read_bytes() == b"1"


def test_the_root_may_be_a_link_but_nothing_below_it(tmp_path: Path) -> None:
    real, secret = tmp_path / "real", tmp_path / "secret"
    for folder in (real, secret):
        folder.mkdir()
    (secret / "key").write_bytes(b"secret")
    (tmp_path / "root").symlink_to(real)
    storage = LocalStorage(tmp_path / "root")
    storage.put("fine", b"x")
    assert (real / "fine").read_bytes() == b"x"
    (real / "dir").symlink_to(secret)
    (real / "file").symlink_to(secret / "key")
    for call in (
        lambda: storage.get("dir/key", 10),
        lambda: storage.get("file", 10),
        lambda: storage.put("dir/new", b"x"),
        lambda: storage.delete("dir/key"),
        lambda: storage.list("dir"),
    ):
        with pytest.raises(StorageError, match="symbolic link") as caught:
            call()
        assert not isinstance(caught.value, ObjectNotFoundError)
    assert [info.key for info in storage.list()] == ["fine"]
    assert storage.directories() == []
    assert os.listdir(secret) == ["key"]


def test_a_link_is_replaced_or_removed_but_never_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"untouched")
    root = tmp_path / "root"
    (root / "step").mkdir(parents=True)
    (root / "latest").symlink_to(target)
    (root / "step" / "link").symlink_to(target)
    (root / "step" / "up").symlink_to(tmp_path)
    storage = LocalStorage(root)
    assert not storage.create("latest", b"x")
    storage.put("latest", b"x")
    storage.delete_prefix("step")
    assert target.read_bytes() == b"untouched"
    assert (root / "latest").read_bytes() == b"x"
    assert not (root / "step").exists()


def test_unfinished_files_are_hidden_beside_their_place_and_go_with_the_directory(
    tmp_path: Path,
) -> None:
    storage = LocalStorage(tmp_path)
    writer = storage.writer("step/shard")
    writer.write(b"half")
    (name,) = os.listdir(tmp_path / "step")
    assert name.startswith(".tmp-")
    assert storage.list() == []
    storage.delete_prefix("step")
    assert os.listdir(tmp_path) == []
    with pytest.raises(StorageError):
        writer.commit()


def test_foreign_names_are_not_listed(tmp_path: Path) -> None:
    for name in ("good", ".hidden", "with space", "ümlaut"):
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bad dir").mkdir()
    (tmp_path / "bad dir" / "inner").write_bytes(b"x")
    storage = LocalStorage(tmp_path)
    assert [info.key for info in storage.list()] == ["good"]
    assert storage.directories() == []


def test_what_is_not_a_regular_file_is_no_object(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ObjectNotFoundError, match="pipe"):
        LocalStorage(tmp_path).get("pipe", 10)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "space"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only"),
     (errno.EIO, "device"), (errno.EACCES, "permission"), (errno.ENAMETOOLONG, "too long"),
     (errno.EMFILE, "ulimit")],
)  # fmt: skip
@pytest.mark.parametrize("call", ["create_file", "write", "sync_file", "sync_directory"])
def test_a_failure_names_the_object_and_what_to_do_and_leaves_nothing(
    tmp_path: Path, call: str, number: int, words: str
) -> None:
    root = tmp_path / "root"
    # Creating the directories makes fsyncs of its own, which succeed here.
    after = 20 if call == "sync_directory" else 0
    storage = LocalStorage(root, disk=FailingDisk(call, number, after))
    with pytest.raises(StorageError, match=words) as caught:
        for index in range(25):
            storage.put(f"step/rank-{index}.shard", b"x" * 100)
    assert "rank-" in str(caught.value) and str(root) in str(caught.value)
    assert not isinstance(caught.value, TransientStorageError)
    if call != "sync_directory":
        assert leftovers(root) == []


def test_a_full_disk_says_how_much_is_missing(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, disk=FailingDisk("write", errno.ENOSPC, 1))
    with storage.writer("shard") as writer:
        writer.write(b"x" * 1000)
        with pytest.raises(StorageError, match="500 missing") as caught:
            writer.write(b"x" * 500)
    assert "byte 1000" in str(caught.value) and "free some" in str(caught.value)
    assert leftovers(tmp_path) == []


def test_a_disk_that_takes_little_at_a_time_is_written_whole(tmp_path: Path) -> None:
    class SmallBites(PosixDisk):
        def write(self, file: int, data: memoryview, offset: int) -> int:
            return super().write(file, data[:7], offset)

    storage = LocalStorage(tmp_path, disk=SmallBites())
    content = bytes(range(256)) * 3
    storage.put("x", content)
    assert storage.get("x", 1000) == content


class TellingDisk(PosixDisk):
    """Notes the size of each write, and which went past the page cache."""

    def __init__(self) -> None:
        super().__init__()
        self.buffered: list[int] = []
        self.direct: list[int] = []

    def write(self, file: int, data: memoryview, offset: int) -> int:
        self.buffered.append(len(data))
        return super().write(file, data, offset)

    def write_direct(self, file: int, data: Sequence[memoryview], offset: int) -> int:
        self.direct.append(sum(map(len, data)))
        return super().write_direct(file, data, offset)


def test_only_large_aligned_writes_go_past_the_page_cache(tmp_path: Path) -> None:
    disk = TellingDisk()
    storage = LocalStorage(tmp_path, disk=disk)
    aligned = memoryview(mmap.mmap(-1, 1 << 20))
    aligned[:] = os.urandom(1 << 20)
    parts = [aligned[:4096], aligned, aligned[:-100], aligned, bytes(100), aligned[512:600_000]]
    with storage.writer("shard") as writer:
        for part in parts:
            writer.write(part)
        writer.commit()
    content = b"".join(parts)
    assert storage.get("shard", len(content)) == content
    with open(tmp_path / "shard", "rb") as file:
        if posix.takes_direct_writes(file.fileno()):
            assert disk.direct == [1 << 20, (1 << 20) - 4096]
    assert sum(disk.direct) + sum(disk.buffered) == len(content)


def test_buffers_that_follow_each_other_go_to_the_disk_in_one_call(tmp_path: Path) -> None:
    disk = TellingDisk()
    storage = LocalStorage(tmp_path, disk=disk)
    aligned = memoryview(mmap.mmap(-1, 1 << 20))
    aligned[:] = os.urandom(1 << 20)
    parts = [aligned[: 1 << 18], aligned[1 << 19 : 3 << 18], b"", aligned[: 1 << 16],
             aligned[4096:9000], bytes(3288), aligned[: 1 << 19], bytes(5)]  # fmt: skip
    with storage.writer("shard") as writer:
        writer.write_all(parts)
        assert writer.position == sum(map(len, parts))
        writer.commit()
    content = b"".join(parts)
    assert storage.get("shard", len(content)) == content
    with open(tmp_path / "shard", "rb") as file:
        if posix.takes_direct_writes(file.fileno()):
            assert disk.direct == [(1 << 19), 1 << 19]
    assert sum(disk.direct) + sum(disk.buffered) == len(content)


class StutteringDisk(PosixDisk):
    """Takes one page and a half of what goes past the page cache."""

    def write_direct(self, file: int, data: Sequence[memoryview], offset: int) -> int:
        return self.write(file, data[0][:6144], offset)


def test_a_direct_write_that_takes_less_is_gone_on_with(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, disk=StutteringDisk())
    aligned = memoryview(mmap.mmap(-1, 1 << 20))
    aligned[:] = os.urandom(1 << 20)
    with storage.writer("shard") as writer:
        writer.write_all([aligned[: 1 << 18], aligned[1 << 19 :]])
        writer.commit()
    assert storage.get("shard", 1 << 20) == bytes(aligned[: 1 << 18]) + bytes(aligned[1 << 19 :])


def test_a_disk_that_refuses_direct_writes_is_written_all_the_same(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, disk=FailingDisk("write_direct", errno.EINVAL))
    aligned = memoryview(mmap.mmap(-1, 1 << 20))
    storage.put("shard", aligned)
    assert storage.get("shard", 1 << 20) == aligned


def test_a_memory_file_system_takes_no_direct_writes() -> None:
    with open(os.memfd_create("x"), "wb") as file:
        assert not posix.takes_direct_writes(file.fileno())


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN])
def test_a_network_file_systems_hiccup_is_transient(tmp_path: Path, number: int) -> None:
    storage = LocalStorage(tmp_path, disk=FailingDisk("sync_file", number))
    with pytest.raises(TransientStorageError):
        storage.put("x", b"1")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links_create_is_still_conditional(tmp_path: Path, number: int) -> None:
    storage = LocalStorage(tmp_path, disk=FailingDisk("link", number))
    assert storage.create("k", b"1")
    assert not storage.create("k", b"2")
    assert storage.get("k", 10) == b"1"
    assert len(leftovers(tmp_path)) == 1


def test_where_nothing_is_conditional_create_refuses_and_says_what_to_use(tmp_path: Path) -> None:
    disk = FailingDisk("link", errno.EPERM)

    def unsupported(*_: object) -> None:
        raise OSError(errno.EINVAL, "flags")

    disk.rename_new = unsupported  # type: ignore[method-assign]
    storage = LocalStorage(tmp_path, disk=disk)
    with pytest.raises(StorageError, match="s3://"):
        storage.create("k", b"1")
    assert leftovers(tmp_path) == []


def test_a_link_that_succeeded_unanswered_counts(tmp_path: Path) -> None:
    class Unanswered(PosixDisk):
        def link(self, directory: int, source: str, target: str) -> None:
            super().link(directory, source, target)
            raise FileExistsError(errno.EEXIST, "retransmitted")

    assert LocalStorage(tmp_path, disk=Unanswered()).create("k", b"1")
    assert not LocalStorage(tmp_path, disk=Unanswered()).create("k", b"1")


def test_where_a_directory_cannot_be_fsynced_a_write_says_what_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems in user space refuse it: nothing there would survive a crash for sure."""

    def fsync(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr("spotspeed.storage.posix.os.fsync", fsync)
    with pytest.raises(StorageError, match=r"refuses fsync of a directory.* choose one that can"):
        LocalStorage(tmp_path).put("x", b"1")


def test_a_directory_that_cannot_be_fsynced_because_it_is_foreign_is_skipped() -> None:
    nobody = 65534
    top = Path(tempfile.mkdtemp())
    (top / "parent" / "root").mkdir(parents=True)
    if os.geteuid() == 0:
        os.chown(top / "parent" / "root", nobody, nobody)
    top.chmod(0o755)
    (top / "parent").chmod(0o111)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setgid(nobody)
                os.setuid(nobody)
            with pytest.raises(PermissionError):
                os.listdir(top / "parent")
            LocalStorage(top / "parent" / "root").put("x", b"1")
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert (top / "parent" / "root" / "x").read_bytes() == b"1"
    (top / "parent").chmod(0o755)
    shutil.rmtree(top)


def test_descriptors_do_not_leak(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "r")
    storage.put("d/x", b"1")
    before = len(os.listdir("/proc/self/fd"))
    for index in range(50):
        storage.put("d/x", b"2")
        storage.create(f"d/{index % 3}", b"3")
        storage.get("d/x", 10)
        storage.list()
        with pytest.raises(StorageError):
            storage.get("d/x/y", 10)
        with pytest.raises(StorageError):
            storage.put("d/x/y", b"1")
        storage.writer("d/w").abort()
        storage.delete("d/0")
        storage.delete_prefix("d/none")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("url", ["", " ", "a\0b", "\ud800", "file://a", "://x", "s3://", "no://x"])
def test_a_url_that_names_no_store_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError):
        open_storage(url)


def test_a_path_that_is_a_file_or_a_dangling_link_is_a_configuration_error(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is a file"):
        open_storage(tmp_path / "file")
    with pytest.raises(ConfigError, match="link to nothing"):
        open_storage(tmp_path / "link")


def test_a_path_below_a_file_fails_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    storage = open_storage(tmp_path / "file" / "below")
    with pytest.raises(StorageError, match="not a directory"):
        storage.put("x", b"1")
    with pytest.raises(StorageError):
        storage.get("x", 1)


def test_file_urls_and_home_directories_are_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    open_storage(f"file://{tmp_path}/a").put("x", b"1")
    open_storage("~/a").put("y", b"2")
    monkeypatch.chdir(tmp_path)
    assert [info.key for info in open_storage("a").list()] == ["x", "y"]


def test_memory_urls_of_one_name_are_one_store() -> None:
    open_storage("memory://one").put("x", b"1")
    assert open_storage("memory://one/").get("x", 10) == b"1"
    assert open_storage("memory://two").list() == []
