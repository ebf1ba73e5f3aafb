"""MPI for messages: initialised for threads where nobody has, and its world is this job's."""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

from spotspeed.errors import ConfigError, CoordinationError

_POLL_S = 0.001
_LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
_INSTEAD = 'leave "coordinator.transport" out to use sockets'
_SLOT_BYTES = 64


class Calls:
    """Keeps the control thread out of MPI from when the main thread begins to finalise it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_over = False


calls = Calls()
_unfinished: list[Any] = []
"""Collectives that were given up. MPI takes none back, and writes when the last rank comes."""


@dataclass(frozen=True, slots=True)
class MpiWorld:
    """A communicator of this job's ranks for nobody but us, and each rank's place in it.

    `places` by rank of torch.distributed, which need not be MPI's.
    """

    communicator: Any
    places: tuple[int, ...]


def join_mpi(rank: int, world_size: int, timeout_s: float) -> MpiWorld:
    """Duplicate COMM_WORLD, with errors returned; every rank calls it, on its main thread.

    Initialises MPI where nobody has, and has it finalised when the process ends by itself. Raises
    ConfigError where there is no MPI, or it is not for threads, CoordinationError when a rank does
    not come in time.
    """
    mpi = _threaded_mpi(world_size)
    deadline_s = time.monotonic() + timeout_s
    slot = json.dumps(rank).encode().ljust(_SLOT_BYTES)
    gathered = bytearray(_SLOT_BYTES * world_size)
    try:
        communicator, request = mpi.COMM_WORLD.Idup()
        await_mpi(request, deadline_s, timeout_s, result=communicator)
        communicator.Set_errhandler(mpi.ERRORS_RETURN)
        await_mpi(
            communicator.Iallgather([slot, mpi.BYTE], [gathered, mpi.BYTE]), deadline_s, timeout_s
        )
    except mpi.Exception as error:
        raise CoordinationError(f"MPI could not connect the ranks: {error}") from error
    starts = range(0, len(gathered), _SLOT_BYTES)
    found = [int(json.loads(gathered[start : start + _SLOT_BYTES])) for start in starts]
    if sorted(found) != list(range(world_size)):
        raise CoordinationError(
            f"expected each of the ranks 0 to {world_size - 1} once in MPI's world, found {found}"
        )
    return MpiWorld(communicator, tuple(found.index(each) for each in range(world_size)))


def await_mpi(request: Any, deadline_s: float, timeout_s: float, *, result: Any = None) -> None:
    """Wait for a collective of all ranks; raises CoordinationError when it takes too long.

    `result` is what MPI writes into, other than the request's own buffers.
    """
    try:
        while not request.Test():
            if time.monotonic() > deadline_s:
                raise CoordinationError(
                    f"the ranks did not meet through MPI within {timeout_s:g} s: "
                    f"every rank must attach"
                )
            time.sleep(_POLL_S)
    except BaseException:  # a signal's, too
        _unfinished.append((request, result))
        raise


def is_under_mpi() -> bool:
    """Whether an MPI launcher has started this process; elsewhere MPI knows one rank only."""
    return any(variable in os.environ for variable in _LAUNCHER_VARIABLES)


def import_mpi() -> Any:
    """mpi4py.MPI without its side effects: neither initialised nor finalised by importing it.

    Raises ImportError or RuntimeError (no libmpi) where there is none.
    """
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    from mpi4py import MPI

    return MPI


def _threaded_mpi(world_size: int) -> Any:
    if not is_under_mpi():
        raise ConfigError(
            f'coordinator.transport is "mpi", and no MPI launcher started this process: launch by '
            f"mpirun or `deepspeed --launcher openmpi`, or {_INSTEAD}"
        )
    try:
        mpi = import_mpi()
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f'coordinator.transport is "mpi", and MPI cannot be used: {reason[0]}; install mpi4py '
            f"and the launcher's libmpi, or {_INSTEAD}"
        ) from error
    if not mpi.Is_initialized():
        mpi.Init_thread(mpi.THREAD_MULTIPLE)
        _finalize_at_exit(mpi)
    if mpi.Is_finalized() or mpi.Query_thread() < mpi.THREAD_MULTIPLE:
        raise ConfigError(
            f'coordinator.transport is "mpi", which needs MPI_THREAD_MULTIPLE, found level '
            f"{mpi.Query_thread()} of {mpi.THREAD_MULTIPLE}: do not lower mpi4py.rc.thread_level, "
            f"or {_INSTEAD}"
        )
    if mpi.COMM_WORLD.size != world_size:
        raise ConfigError(
            f'coordinator.transport is "mpi", and MPI\'s world has {mpi.COMM_WORLD.size} ranks, '
            f"the job {world_size}: start all ranks by one MPI launcher, or {_INSTEAD}"
        )
    return mpi


def _finalize_at_exit(mpi: Any) -> None:
    """A rank that ends without it makes the launcher end all the others."""

    def finalize() -> None:
        with calls.lock:
            calls.is_over = True
        if not mpi.Is_finalized():
            mpi.Finalize()

    atexit.register(finalize)
