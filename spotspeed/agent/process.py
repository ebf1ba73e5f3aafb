"""How the saver becomes a process of its own: election, double fork, log, priorities.

Launchers kill by process group, by session and by walking the descendants of a rank; a process
that has been forked twice and leads a session of its own is in none of these.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import platform
import signal
import socket
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

NICE = 5
"""A third of what the training gets of a core that both want, and all that it leaves idle.

Not more: on a node whose cores are all taken, by loaders of data too, a save would take minutes.
"""
_AUTOGROUP = Path("/proc/self/autogroup")
_LOG_BYTES_MAX = 1 << 20
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_BEST_EFFORT_LOWEST = (2 << 13) | 7
_BACKLOG = 512


@dataclass(frozen=True, slots=True)
class Log:
    """The saver's log file."""

    path: Path

    def leave(self) -> None:
        """Remove the log when there is nothing in it."""
        logging.shutdown()
        if self.path.exists() and self.path.stat().st_size == 0:
            self.path.unlink()


def elect(name: str) -> socket.socket | None:
    """Listen at `name` in the abstract socket namespace; None when another process does.

    Binding the name is the election: of all processes of a network namespace one succeeds, and
    the kernel frees the name when the winner is gone, however it went.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind("\0" + name)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    listener.listen(_BACKLOG)
    return listener


def detach(listener: socket.socket, name: str) -> Log | None:
    """Leave the caller's process tree; None in the process that the caller waits for.

    In the saver: a session of its own, no controlling terminal, no descriptors but the listener
    and the log, signals by which launchers end jobs ignored. Must be called before any thread has
    been started.
    """
    path = log_directory() / f"{name}.log"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    if os.fstat(log).st_size > _LOG_BYTES_MAX:
        os.ftruncate(log, 0)
    child = os.fork()
    if child > 0:
        os.waitpid(child, 0)
        return None
    os.setsid()
    if os.fork() > 0:
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(log, 2)
    kept = listener.fileno()
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    free_cores()
    weigh_session(NICE)
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING,
        format=f"%(asctime)s saver[{os.getpid()}] %(levelname)s %(message)s",
    )  # fmt: skip
    return Log(path)


def free_cores() -> None:
    """Leave the cores to which a launcher has bound the rank that started this process."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


def weigh_session(niceness: int) -> None:
    """Say how nice this session as a whole is, where the kernel shares cores among sessions.

    With autogroups, which sched(7) describes, how nice a thread is counts within its session only:
    the saver leads one of its own, and would get as much as all of the training. Going back to 0
    needs no privilege. What the kernel refuses or does not know is left as it is.
    """
    with contextlib.suppress(OSError):
        _AUTOGROUP.write_text(str(niceness))


def lower_priority() -> None:
    """Let the calling thread yield CPU and disk to the training, for good.

    Only a privileged process may raise the priority again; so the threads that store ordinary
    saves are lowered, and those that store the save of a notice never were. A batch thread never
    interrupts another when it wakes, as it does for each chunk and each answer of the disk. What
    the kernel refuses is left as it is.
    """
    try:
        os.nice(NICE)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError as error:
        logging.getLogger("spotspeed").info("lower priority: %s", error)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, 1, 0, _IOPRIO_BEST_EFFORT_LOWEST)


def log_directory() -> Path:
    """This user's directory for logs of savers, mode 0700; OSError when it is not ours alone."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        path = Path(runtime) / "spotspeed"
    else:
        path = Path("/tmp") / f"spotspeed-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not is_ours or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(
            f"{path} must be a directory of user {os.getuid()} with mode 0700: remove it, or set "
            f"XDG_RUNTIME_DIR"
        )
    return path
