"""The processes of one launch on this machine, found by the variable that marks them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from spotspeed.supervised import VARIABLES

RANK_VARIABLES = (
    "RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID", "SLURM_STEP_ID"
)  # fmt: skip
"""A batch script of SLURM has SLURM_PROCID itself; only the tasks of srun have a step."""
NOTICE_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""Signals that mean a notice to a rank, in the order of preference."""
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Member:
    """One process of a launch; `ticks`, when it started, tells it from a later one of its pid."""

    pid: int
    ticks: int
    is_attached: bool
    """Whether it has said that it is a rank with a checkpointer."""
    is_rank: bool
    """That, or a launcher gave it a rank: it may attach still, or be a rank's child."""
    caught: int
    """Bit n - 1: it has a handler for signal n."""

    @property
    def hears(self) -> signal.Signals | None:
        """The signal by which it hears a notice, None when any would kill it or do nothing.

        Only a rank that has attached takes a signal for a notice. DataLoader workers have a handler
        for SIGTERM from torch, which ends them, and their rank with them.
        """
        if not self.is_attached:
            return None
        return next((n for n in NOTICE_SIGNALS if self.caught >> (n - 1) & 1), None)


def members(
    mark: str, attached: Collection[int] = (), environ: Mapping[str, str] = os.environ
) -> list[Member]:
    """This user's processes that carry `mark`; `attached` are the ids that ranks have told.

    A launcher that leaves, or forks twice, loses none of them. Variables that are already in
    `environ`, the supervisor's own, do not make a process a rank.
    """
    wanted = {f"{name}={mark}".encode() for name in VARIABLES}
    ranks = tuple(f"{n}=".encode() for n in RANK_VARIABLES if n not in environ)
    found = []
    for pid in _pids():
        # A process may end, or belong to somebody else, at any of these reads.
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{pid}/environ", "rb") as file:
                variables = file.read().split(b"\0")
            if not wanted.isdisjoint(variables):
                is_attached = pid in attached
                is_rank = is_attached or any(each.startswith(ranks) for each in variables if ranks)
                found.append(Member(pid, _ticks(pid), is_attached, is_rank, _caught(pid)))
    return found


def send(member: Member, number: int) -> bool:
    """Signal exactly this process; False when it is gone."""
    try:
        descriptor = os.pidfd_open(member.pid)
    except OSError:
        return False
    try:
        if _ticks(member.pid) != member.ticks:
            return False
        signal.pidfd_send_signal(descriptor, number)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _rest() -> bool:
    time.sleep(_POLL_S)
    return False


def end_all(
    find: Callable[[], Iterable[Member]], *, grace_s: float, is_urgent: Callable[[], bool] = _rest
) -> int:
    """End what `find` still finds: SIGTERM, and SIGKILL after `grace_s`; returns how many.

    `is_urgent` is called between two looks, and takes its time: whether the grace is over already.
    """
    told: set[tuple[int, int]] = set()
    deadline, is_late = time.monotonic() + grace_s, False
    while left := list(find()):
        is_late = is_late or time.monotonic() >= deadline
        for member in left:
            if is_late or (member.pid, member.ticks) not in told:
                send(member, signal.SIGKILL if is_late else signal.SIGTERM)
                told.add((member.pid, member.ticks))
        is_late = is_urgent() or is_late
        if is_late and time.monotonic() > deadline + grace_s + 10.0:
            break
    return len(told)


def _pids() -> Iterator[int]:
    yield from (int(name) for name in os.listdir("/proc") if name.isdigit())


def _ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise ProcessLookupError(pid)
    return int(fields[19])


def _caught(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("SigCgt:"))
