"""Which process this is, and whether another one lives, as far as /proc can tell."""

from __future__ import annotations

import os
import secrets
import socket

from spotspeed.core.owner import Identity, Process


def this_process() -> Identity:
    """The identity of the calling process."""
    return identity_of(os.getpid())


def identity_of(pid: int) -> Identity:
    """The identity of a living process of this process's namespace."""
    return Identity(socket.gethostname(), _boot_id(), _namespace(), pid, _start_ticks(pid) or 0)


def parent_of(pid: int) -> int | None:
    """The process that `pid` was started by, or was given to; None when there is none."""
    fields = _stat(pid)
    return None if fields is None else int(fields[1]) or None


def see_process(owner: Identity, viewer: Identity) -> Process:
    """What `viewer`, which must be a process of this machine, can see of `owner`."""
    if not owner.is_visible_to(viewer):
        return Process.UNKNOWN
    if (owner.pid, owner.start_ticks) == (viewer.pid, viewer.start_ticks):
        return Process.OURS
    return Process.ALIVE if _start_ticks(owner.pid) == owner.start_ticks else Process.GONE


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        # Without it no process can be judged from afar: the counter decides.
        return secrets.token_hex(16)


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return secrets.token_hex(16)


def _start_ticks(pid: int) -> int | None:
    """When the process started, or None when there is none or it is a zombie."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def _stat(pid: int) -> list[str] | None:
    """/proc/PID/stat from its third field, the state, on; None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None
