"""The directories of a local store: found without following links, created durably."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from spotspeed.errors import StorageError
from spotspeed.storage import posix
from spotspeed.storage.contract import Leftover, ObjectInfo, check_key
from spotspeed.storage.posix import Disk

TEMPORARY_PREFIX = ".tmp-"
"""What the names of files begin with that are being written; no key may have one."""
_REMOVE_ATTEMPTS = 10


class LocalTree:
    """The directories below `root`, of which it remembers those known to be durable.

    Methods raise OSError; whoever calls them knows the operation that failed.
    """

    def __init__(self, root: str, disk: Disk) -> None:
        self._root = root
        self._disk = disk
        self._durable: set[tuple[str, int]] = set()

    def find(self, path: str) -> int | None:
        """A descriptor of directory `path` ("" is the root), or None where there is none."""
        try:
            directory = os.open(self._root, posix.DIRECTORY_FLAGS)
        except FileNotFoundError:
            return None
        for part in path.split("/") if path else []:
            try:
                child = posix.open_directory(directory, part)
            except FileNotFoundError:
                return None
            except NotADirectoryError:
                if _is_link(directory, part):
                    raise OSError(errno.ELOOP, "symbolic link", part) from None
                return None
            finally:
                os.close(directory)
            directory = child
        return directory

    def make(self, path: str) -> int:
        """A descriptor of directory `path`, created where missing, durable up to the root."""
        directory = self._open_root()
        reached = ""
        for part in path.split("/") if path else []:
            reached = f"{reached}/{part}"
            try:
                child = self._enter(directory, part, reached)
            finally:
                self._disk.close(directory)
            directory = child
        return directory

    def _enter(self, directory: int, name: str, path: str) -> int:
        """Open a directory, creating it if need be, with its name durable in its parent."""
        try:
            child = posix.open_directory(directory, name)
        except FileNotFoundError:
            self._disk.make_directory(directory, name)
            child = posix.open_directory(directory, name)
        except NotADirectoryError:
            if _is_link(directory, name):
                raise OSError(errno.ELOOP, "symbolic link", name) from None
            raise
        try:
            mark = (path, os.fstat(child).st_ino)
            if mark not in self._durable:
                self._disk.sync_directory(directory)
                self._durable.add(mark)
        except OSError:
            self._disk.close(child)
            raise
        return child

    def _open_root(self) -> int:
        """Open the root, creating it and what leads to it if need be."""
        try:
            root = os.open(self._root, posix.DIRECTORY_FLAGS)
        except FileNotFoundError:
            self._create_root()
            root = os.open(self._root, posix.DIRECTORY_FLAGS)
        status = os.fstat(root)
        mark = ("", status.st_ino)
        try:
            if mark not in self._durable:
                self._sync_ancestors(status.st_dev)
                self._durable.add(mark)
        except OSError:
            self._disk.close(root)
            raise
        return root

    def _create_root(self) -> None:
        missing: list[str] = []
        path = self._root
        while not os.path.lexists(path):
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            parent = os.open(os.path.dirname(path), posix.DIRECTORY_FLAGS)
            try:
                self._disk.make_directory(parent, os.path.basename(path))
            finally:
                self._disk.close(parent)

    def _sync_ancestors(self, device: int) -> None:
        """Make the path to the root durable, as far as its file system reaches.

        Another rank may have created parts of it a moment ago. A directory that this user may not
        open is one that it did not create, and is left to whoever did.
        """
        path = self._root
        while path != os.path.dirname(path):
            path = os.path.dirname(path)
            try:
                directory = os.open(path, posix.DIRECTORY_FLAGS)
            except PermissionError:
                continue
            try:
                if os.fstat(directory).st_dev != device:
                    return
                self._disk.sync_directory(directory)
            finally:
                self._disk.close(directory)


def subdirectories(directory: int) -> list[str]:
    """Names of the directories right below an open one, unordered."""
    return [entry.name for entry in _entries(directory) if entry.is_dir(follow_symlinks=False)]


def collect(directory: int, prefix: str, found: list[ObjectInfo]) -> None:
    """Add every object below an open directory; what vanishes meanwhile is left out."""
    for entry in _entries(directory):
        with contextlib.suppress(FileNotFoundError):
            if entry.is_dir(follow_symlinks=False):
                child = posix.open_directory(directory, entry.name)
                try:
                    collect(child, f"{prefix}{entry.name}/", found)
                finally:
                    os.close(child)
            elif entry.is_file(follow_symlinks=False):
                status = os.stat(entry.name, dir_fd=directory, follow_symlinks=False)
                found.append(ObjectInfo(prefix + entry.name, status.st_size))


def collect_leftovers(directory: int, prefix: str, found: list[Leftover]) -> None:
    """Add every file that has not got its name yet, below an open directory."""
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(TEMPORARY_PREFIX)]
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                found.append(Leftover(prefix + name, status.st_size, status.st_mtime))
    for name in subdirectories(directory):
        with contextlib.suppress(FileNotFoundError):
            child = posix.open_directory(directory, name)
            try:
                collect_leftovers(child, f"{prefix}{name}/", found)
            finally:
                os.close(child)


def remove(disk: Disk, parent: int, name: str) -> None:
    """Remove a directory and all in it, hidden files too; links are removed, not followed.

    What others put into it meanwhile goes as well, within reason.
    """
    for _ in range(_REMOVE_ATTEMPTS - 1):
        try:
            return _remove_once(disk, parent, name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    _remove_once(disk, parent, name)


def _remove_once(disk: Disk, parent: int, name: str) -> None:
    try:
        directory = posix.open_directory(parent, name)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        with os.scandir(directory) as scan:
            entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in scan]
        for child, is_directory in entries:
            if is_directory:
                remove(disk, directory, child)
            else:
                with contextlib.suppress(FileNotFoundError):
                    disk.unlink(directory, child)
    finally:
        disk.close(directory)
    with contextlib.suppress(FileNotFoundError):
        disk.remove_directory(parent, name)


def _entries(directory: int) -> list[os.DirEntry[str]]:
    """What has a usable name in an open directory: not hidden, not foreign."""
    usable: list[os.DirEntry[str]] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(StorageError):
                check_key(entry.name)
                usable.append(entry)
    return usable


def _is_link(directory: int, name: str) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
