"""The few system calls by which local storage changes the disk, behind one small seam.

Everything is relative to an open directory and follows no symbolic link, so that a path cannot
leave the root while it is being used. tests/crash/ records this interface to enumerate what a
disk may hold after a crash; nothing else in spotspeed writes to a local store.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
from collections.abc import Sequence
from typing import Protocol

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_RENAME_NOREPLACE = 1
ALIGNMENT_BYTES = 4096
"""What direct writes are aligned to: a page, and a multiple of every device's block."""
_DIRECT_FILESYSTEMS = frozenset({"ext3", "ext4", "xfs"})
"""Where a direct write goes to a block device at once; others may send each one over a network."""
_SYNC_FILE_RANGE_WRITE = 2

LINK_UNSUPPORTED = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})

_SYNC_UNSUPPORTED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
_NO_DIRECTORY_SYNC = (
    "the file system refuses fsync of a directory, so a new file's name may be lost in a crash and "
    "nothing there can be called durable; choose one that can (ext4, xfs, NFS, Lustre), or give "
    "the bucket's own URL if it is a mounted bucket"
)


class Disk(Protocol):
    """Changes of directories and files; every argument `directory` and `file` is an open fd."""

    def make_directory(self, directory: int, name: str) -> bool:
        """Create an empty directory; False when there is something of that name."""

    def create_file(self, directory: int, name: str) -> int:
        """Create an empty file that did not exist and open it for writing."""

    def write(self, file: int, data: memoryview, offset: int) -> int:
        """Write at `offset`; returns how many bytes were taken, maybe fewer than given."""

    def write_direct(self, file: int, data: Sequence[memoryview], offset: int) -> int:
        """Like `write`, one after the other and past the page cache.

        Addresses, offset and sizes are aligned.
        """

    def start_writeback(self, file: int, offset: int, size_bytes: int) -> None:
        """Ask for the range to be written soon; promises nothing."""

    def sync_file(self, file: int) -> None:
        """Return when the file's bytes and size are on stable storage."""

    def sync_directory(self, directory: int) -> None:
        """Return when the names in the directory are on stable storage."""

    def rename(self, directory: int, source: str, target: str) -> None:
        """Give the file `source` the name `target`, replacing what has it."""

    def link(self, directory: int, source: str, target: str) -> None:
        """Give the file a second name; FileExistsError when `target` exists."""

    def rename_new(self, directory: int, source: str, target: str) -> None:
        """Rename where `target` does not exist; FileExistsError when it does."""

    def unlink(self, directory: int, name: str) -> None:
        """Remove a name of a file or of a symbolic link."""

    def remove_directory(self, directory: int, name: str) -> None:
        """Remove an empty directory."""

    def close(self, descriptor: int) -> None:
        """Close a file or directory."""


class PosixDisk:
    """The calls themselves."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._sync_file_range = getattr(libc, "sync_file_range", None)
        if self._sync_file_range is not None:
            self._sync_file_range.argtypes = [
                ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint,
            ]  # fmt: skip
        self._renameat2 = getattr(libc, "renameat2", None)
        if self._renameat2 is not None:
            self._renameat2.argtypes = [
                ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint,
            ]  # fmt: skip

    def make_directory(self, directory: int, name: str) -> bool:
        try:
            os.mkdir(name, 0o777, dir_fd=directory)
        except FileExistsError:
            return False
        return True

    def create_file(self, directory: int, name: str) -> int:
        return os.open(name, _WRITE_FLAGS, 0o666, dir_fd=directory)

    def write(self, file: int, data: memoryview, offset: int) -> int:
        return os.pwrite(file, data, offset)

    def write_direct(self, file: int, data: Sequence[memoryview], offset: int) -> int:
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
        try:
            return os.pwritev(file, data, offset)
        finally:
            fcntl.fcntl(file, fcntl.F_SETFL, flags)

    def start_writeback(self, file: int, offset: int, size_bytes: int) -> None:
        if self._sync_file_range is not None:
            self._sync_file_range(file, offset, size_bytes, _SYNC_FILE_RANGE_WRITE)

    def sync_file(self, file: int) -> None:
        os.fsync(file)

    def sync_directory(self, directory: int) -> None:
        try:
            os.fsync(directory)
        except OSError as error:
            if error.errno in _SYNC_UNSUPPORTED:
                raise OSError(error.errno, _NO_DIRECTORY_SYNC) from error
            raise

    def rename(self, directory: int, source: str, target: str) -> None:
        os.rename(source, target, src_dir_fd=directory, dst_dir_fd=directory)

    def link(self, directory: int, source: str, target: str) -> None:
        os.link(source, target, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)

    def rename_new(self, directory: int, source: str, target: str) -> None:
        if self._renameat2 is None:
            raise OSError(errno.ENOSYS, "no renameat2")
        names = os.fsencode(source), os.fsencode(target)
        if self._renameat2(directory, names[0], directory, names[1], _RENAME_NOREPLACE) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), target)

    def unlink(self, directory: int, name: str) -> None:
        os.unlink(name, dir_fd=directory)

    def remove_directory(self, directory: int, name: str) -> None:
        os.rmdir(name, dir_fd=directory)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)


def open_directory(directory: int, name: str) -> int:
    """Open a directory below `directory`; a symbolic link is refused (ELOOP or ENOTDIR)."""
    return os.open(name, DIRECTORY_FLAGS | os.O_NOFOLLOW, dir_fd=directory)


def open_file(directory: int, name: str) -> int:
    """Open a file below `directory` for reading; a symbolic link is refused (ELOOP)."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=directory)


def is_aligned(view: memoryview) -> bool:
    """Whether the memory begins at a page; False as well when that cannot be told (read-only)."""
    if view.readonly or len(view) == 0:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) % ALIGNMENT_BYTES == 0


def takes_direct_writes(file: int) -> bool:
    """Whether the file lies on a block device of this machine, by its file system's type."""
    return _filesystem_type(os.fstat(file).st_dev) in _DIRECT_FILESYSTEMS


@functools.lru_cache(maxsize=64)
def _filesystem_type(device: int) -> str:
    """The type of the file system mounted from `device` (proc(5), mountinfo), or ""."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                fields = line.split()
                if fields[2] == wanted:
                    return fields[fields.index("-") + 1]
    except OSError:
        return ""
    return ""


def read_exact(file: int, view: memoryview, offset: int) -> int:
    """Fill `view` from `offset` as far as the file reaches; returns the bytes read."""
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
