"""Locks that killed builds of operators have left: the next start waits for them for ever.

torch (torch/utils/file_baton.py) creates a file `lock` in the folder of an extension, keeps it open
while it builds there, and removes it then. A build that is killed only closes it.
"""

from __future__ import annotations

import contextlib
import glob
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs"})
"""File systems that no other machine writes to."""
INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""From where every process of the machine is seen (PROC_PID_INIT_INO of Linux)."""
PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class BuildLock:
    """A lock that no process holds, as far as is seen from here."""

    path: str
    is_dead: bool
    """Whether everybody who could hold it is seen; else it is only old."""


def abandoned_locks(environ: Mapping[str, str], *, older_s: float = 600.0) -> list[BuildLock]:
    """Locks of builds that have ended, and those that have probably ended `older_s` ago."""
    root = environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    found = glob.glob(os.path.join(glob.escape(root), "**", "lock"), recursive=True)
    free = _not_open(found)
    if free:
        # One that is being released is closed a moment before it is removed.
        time.sleep(PAUSE_S)
        free = _not_open([path for path in free if os.path.exists(path)])
    locks = [BuildLock(path, _is_seen_whole(path)) for path in free]
    return [lock for lock in locks if lock.is_dead or _age_s(lock.path) > older_s]


def remove_dead(environ: Mapping[str, str]) -> Iterator[str]:
    """Remove the locks whose builders are dead; yields a line about each that was found."""
    for lock in abandoned_locks(environ):
        if lock.is_dead:
            with contextlib.suppress(FileNotFoundError):
                os.remove(lock.path)
            yield f"removed {lock.path}: the build that made it was killed"
        else:
            yield (f"{lock.path} looks left over from a build that was killed, and a start would "
                   f"wait for it: remove it if no other machine builds there")  # fmt: skip


def _not_open(paths: list[str]) -> list[str]:
    """Those that no process has open."""
    files = {}
    for path in paths:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            files[status.st_dev, status.st_ino] = path
    for descriptor in glob.iglob("/proc/[0-9]*/fd/*") if files else ():
        # A process may end, or belong to somebody else, at any of these looks.
        with contextlib.suppress(OSError):
            status = os.stat(descriptor)
            files.pop((status.st_dev, status.st_ino), None)
    return sorted(files.values())


def _is_seen_whole(path: str) -> bool:
    """Whether a process that has this file open could not have been overlooked."""
    try:
        status = os.stat(path)
        is_own = os.getuid() in (0, status.st_uid)
        is_private = status.st_dev == os.stat("/").st_dev
        sees_all = os.readlink("/proc/self/ns/pid") == INITIAL_PID_NAMESPACE
    except OSError:
        return False
    return is_own and (is_private or sees_all) and filesystem_of(path) in LOCAL


def filesystem_of(path: str, mounts: str = "/proc/mounts") -> str:
    """The type of the file system that `path` lies on, "unknown" where that cannot be told."""
    real, best = os.path.realpath(path), ("", "unknown")
    try:
        lines = Path(mounts).read_text().splitlines()
    except OSError:
        return best[1]
    for line in lines:
        _, point, kind = line.split()[:3]
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def _age_s(path: str) -> float:
    try:
        return time.time() - os.stat(path).st_mtime
    except OSError:
        return 0.0
