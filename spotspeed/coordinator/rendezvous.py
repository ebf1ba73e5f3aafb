"""Tells every rank where the others listen: by MPI where it runs, else by the job's store.

The training's communicators are not used: MPI's world is duplicated, the store is cloned (for a
TCPStore that is a connection of its own). MPI that nobody has initialised is left alone, because a
process that initialises it has to finalise together with all the others. The secret is as private
as what carries it: whoever can read the job's store can join the job.
"""

from __future__ import annotations

import itertools
import json
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from spotspeed.coordinator.address import Endpoint
from spotspeed.coordinator.mpi_world import await_mpi, import_mpi, is_under_mpi
from spotspeed.errors import CoordinationError

_SECRET_BYTES = 32
_SLOT_BYTES = 4096

_attempts = itertools.count()


@dataclass(frozen=True, slots=True)
class Introduction:
    """What every rank knows of the job once all have met."""

    secret: bytes
    endpoints: Mapping[int, Endpoint]


class Rendezvous(Protocol):
    """Where the ranks of a job meet once."""

    @property
    def name(self) -> str:
        """How logs call it."""
        ...

    def meet(self, own: Endpoint, *, world_size: int, timeout_s: float) -> Introduction:
        """Publish `own` and learn the rest; every rank calls it. Raises CoordinationError."""
        ...


def find_rendezvous(world_size: int) -> Rendezvous:
    """MPI where it is initialised and its world is this job, else the default group's store.

    Raises CoordinationError where there is neither.
    """
    world = _mpi_world(world_size)
    if world is not None:
        return MpiRendezvous(world)
    store = default_store()
    if store is None:
        raise CoordinationError(
            "the ranks cannot find each other: torch.distributed is not initialised; call "
            "deepspeed.initialize or torch.distributed.init_process_group first"
        )
    return StoreRendezvous(store)


class MpiRendezvous:
    """One allgather on a duplicate of COMM_WORLD; ranks are those of `own.rank`, not MPI's."""

    def __init__(self, world: Any) -> None:
        self.name = f"MPI ({world.size} ranks)"
        self._world = world

    def meet(self, own: Endpoint, *, world_size: int, timeout_s: float) -> Introduction:
        from mpi4py import MPI

        deadline_s = time.monotonic() + timeout_s
        slot = json.dumps([secrets.token_hex(_SECRET_BYTES), own.encode().decode()]).encode()
        gathered = bytearray(_SLOT_BYTES * world_size)
        try:
            duplicate, request = self._world.Idup()
            await_mpi(request, deadline_s, timeout_s)
            duplicate.Set_errhandler(MPI.ERRORS_RETURN)
            request = duplicate.Iallgather(
                [slot.ljust(_SLOT_BYTES), MPI.BYTE], [gathered, MPI.BYTE]
            )
            await_mpi(request, deadline_s, timeout_s)
            duplicate.Free()
        except MPI.Exception as error:
            raise CoordinationError(f"MPI could not connect the ranks: {error}") from error
        slots = [gathered[i : i + _SLOT_BYTES] for i in range(0, len(gathered), _SLOT_BYTES)]
        found = {endpoint.rank: (secret, endpoint) for secret, endpoint in map(_read_slot, slots)}
        _check_complete(list(found), world_size)
        return Introduction(found[0][0], {rank: found[rank][1] for rank in sorted(found)})


class StoreRendezvous:
    """Rank 0 collects what the others put in a torch store, and publishes it with the secret."""

    def __init__(self, store: Any) -> None:
        self.name = f"the job's {type(_innermost(store)).__name__}"
        self._store = second_client(store)

    def meet(self, own: Endpoint, *, world_size: int, timeout_s: float) -> Introduction:
        prefix = f"spotspeed/rendezvous/{next(_attempts)}"
        deadline_s = time.monotonic() + timeout_s
        if own.rank != 0:
            self._store.set(f"{prefix}/{own.rank}", own.encode())
            published = self._get(f"{prefix}/all", deadline_s)
        else:
            others = [self._get(f"{prefix}/{rank}", deadline_s) for rank in range(1, world_size)]
            endpoints = [text.decode() for text in (own.encode(), *others)]
            published = json.dumps([secrets.token_hex(_SECRET_BYTES), endpoints]).encode()
            self._store.set(f"{prefix}/all", published)
        secret, texts = json.loads(published)
        found = [Endpoint.decode(text.encode()) for text in texts]
        _check_complete([endpoint.rank for endpoint in found], world_size)
        return Introduction(bytes.fromhex(secret), {each.rank: each for each in found})

    def _get(self, key: str, deadline_s: float) -> bytes:
        left_s = max(0.001, deadline_s - time.monotonic())
        try:
            self._store.wait([key], timedelta(seconds=left_s))
            return bytes(self._store.get(key))
        except RuntimeError as error:
            raise CoordinationError(
                f"the ranks did not meet in {self.name}: nothing at {key!r} in time; every rank "
                f"must attach. The store says: {str(error).splitlines()[0]}"
            ) from error


def _read_slot(slot: bytearray) -> tuple[bytes, Endpoint]:
    secret, text = json.loads(slot)
    return bytes.fromhex(secret), Endpoint.decode(text.encode())


def _check_complete(ranks: list[int], world_size: int) -> None:
    if sorted(ranks) != list(range(world_size)):
        raise CoordinationError(
            f"expected each of the ranks 0 to {world_size - 1} once, found {sorted(ranks)}: are "
            f"two jobs using one rendezvous, or is a rank numbered twice?"
        )


def _mpi_world(world_size: int) -> Any | None:
    """COMM_WORLD where it can be used from this thread and is this job, else None."""
    if not is_under_mpi():
        return None
    if "mpi4py.MPI" not in sys.modules and not _is_libmpi_loaded():
        return None
    try:
        mpi = import_mpi()
    except (ImportError, RuntimeError):
        return None
    if not mpi.Is_initialized() or mpi.Is_finalized():
        return None
    is_callable = mpi.Query_thread() >= mpi.THREAD_SERIALIZED or mpi.Is_thread_main()
    return mpi.COMM_WORLD if is_callable and mpi.COMM_WORLD.size == world_size else None


def _is_libmpi_loaded() -> bool:
    return "/libmpi" in Path("/proc/self/maps").read_text(errors="replace")


def default_store() -> Any | None:
    """The store of torch.distributed's default group; None where there is none."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def _innermost(store: Any) -> Any:
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def second_client(store: Any) -> Any:
    """The same keys through a client of its own: a blocking wait locks the training's client."""
    return store.clone() if hasattr(store, "clone") else store
