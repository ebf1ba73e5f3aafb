"""Objects as files below a local (or mounted) directory, durable by fsync, atomic by rename.

A file is written under a hidden temporary name next to its place, fsynced, renamed (or linked, for
`create`), and then its directory is fsynced, and so is, once per process, every directory from the
root down to it: another process may have created one and died before it was durable. After Pillai
et al., "All File Systems Are Not Created Equal" (OSDI 2014), section 4, nothing is assumed about
the order in which a file system persists what was not fsynced.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

from spotspeed.errors import FormatError, ObjectNotFoundError, StorageError
from spotspeed.storage import local_tree, posix
from spotspeed.storage.contract import (
    Leftover,
    ObjectInfo,
    ReadBuffer,
    WriteBuffer,
    as_bytes_view,
    check_key,
    check_prefix,
)
from spotspeed.storage.failures import storage_error
from spotspeed.storage.local_tree import LocalTree
from spotspeed.storage.local_writer import LocalWriter
from spotspeed.storage.posix import Disk, PosixDisk


class LocalStorage:
    """A Storage in a directory, which is created by the first write.

    The root itself may be a symbolic link; below it none is followed. `disk` is for tests.
    """

    def __init__(self, root: str | os.PathLike[str], *, disk: Disk | None = None) -> None:
        self._root = os.path.realpath(root)
        self._disk: Disk = PosixDisk() if disk is None else disk
        self._tree = LocalTree(self._root, self._disk)

    @property
    def url(self) -> str:
        return self._root

    @property
    def has_atomic_create(self) -> bool:
        return True

    def put(self, key: str, data: ReadBuffer) -> None:
        with self.writer(key) as writer:
            writer.write(data)
            writer.commit()

    def create(self, key: str, data: ReadBuffer) -> bool:
        with self.writer(key) as writer:
            writer.write(data)
            return writer.commit_new()

    def writer(self, key: str) -> LocalWriter:
        path, _, name = check_key(key).rpartition("/")
        try:
            directory = self._tree.make(path)
        except OSError as error:
            raise storage_error("write", self._place(key), error) from error
        return LocalWriter(self._disk, directory, name, self._place(key))

    def get(self, key: str, limit_bytes: int) -> bytes:
        with self._open(key) as (file, size_bytes):
            if size_bytes > limit_bytes:
                raise FormatError(
                    f"{self._place(key)}: {size_bytes} bytes, at most {limit_bytes} are read"
                )
            data = bytearray(size_bytes)
            return bytes(data[: posix.read_exact(file, memoryview(data), 0)])

    def read_into(self, key: str, offset: int, buffer: WriteBuffer) -> None:
        view = as_bytes_view(buffer)
        with self._open(key) as (file, size_bytes):
            count = posix.read_exact(file, view, offset)
            if count != len(view):
                raise FormatError(
                    f"{self._place(key)}: holds {size_bytes} bytes, "
                    f"[{offset}, {offset + len(view)}) were asked for; the file is cut short"
                )

    def size(self, key: str) -> int:
        with self._open(key) as (_, size_bytes):
            return size_bytes

    def directories(self, prefix: str = "") -> list[str]:
        with self._find(check_prefix(prefix), "list", prefix) as directory:
            return [] if directory is None else sorted(local_tree.subdirectories(directory))

    def delete(self, key: str) -> None:
        path, _, name = check_key(key).rpartition("/")
        self._unlink(path, name)

    def delete_prefix(self, prefix: str) -> None:
        path, _, name = check_key(check_prefix(prefix)).rpartition("/")
        with self._find(path, "delete", prefix) as directory:
            if directory is not None:
                local_tree.remove(self._disk, directory, name)
                self._disk.sync_directory(directory)

    def leftovers(self, prefix: str = "") -> list[Leftover]:
        found: list[Leftover] = []
        prefix = check_prefix(prefix)
        with self._find(prefix, "list", prefix) as directory:
            if directory is not None:
                local_tree.collect_leftovers(directory, f"{prefix}/" if prefix else "", found)
        return sorted(found)

    def discard(self, leftover: Leftover) -> None:
        path, _, name = leftover.path.rpartition("/")
        if not name.startswith(local_tree.TEMPORARY_PREFIX):
            raise StorageError(f"{self._place(leftover.path)}: is not what a write has left")
        self._unlink(check_prefix(path), name)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        found: list[ObjectInfo] = []
        prefix = check_prefix(prefix)
        with self._find(prefix, "list", prefix) as directory:
            if directory is not None:
                local_tree.collect(directory, f"{prefix}/" if prefix else "", found)
        return sorted(found)

    def _unlink(self, path: str, name: str) -> None:
        with self._find(path, "delete", f"{path}/{name}") as directory:
            if directory is not None:
                with contextlib.suppress(FileNotFoundError):
                    self._disk.unlink(directory, name)
                self._disk.sync_directory(directory)

    def _place(self, key: str) -> str:
        return os.path.join(self._root, key)

    @contextlib.contextmanager
    def _find(self, path: str, operation: str, key: str) -> Iterator[int | None]:
        """The open directory `path` or None; what fails inside is a failure of `operation`."""
        try:
            directory = self._tree.find(path)
            try:
                yield directory
            finally:
                if directory is not None:
                    os.close(directory)
        except OSError as error:
            raise storage_error(operation, self._place(key), error) from error

    @contextlib.contextmanager
    def _open(self, key: str) -> Iterator[tuple[int, int]]:
        """The open file of an object, and its size in bytes."""
        path, _, name = check_key(key).rpartition("/")
        with self._find(path, "read", key) as directory:
            if directory is None:
                raise ObjectNotFoundError(f"read {self._place(key)}: there is no such object")
            file = posix.open_file(directory, name)
            try:
                status = os.fstat(file)
                if not stat.S_ISREG(status.st_mode):
                    raise ObjectNotFoundError(f"read {self._place(key)}: it is not a file")
                yield file, status.st_size
            finally:
                os.close(file)
