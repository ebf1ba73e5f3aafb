"""Tells every rank where the others listen: by MPI where it runs, else by the job's store.

The training's communicators are not used: MPI's world is duplicated, the store is cloned (for a
TCPStore that is a connection of its own). MPI that nobody has initialised is left alone, because a
process that initialises it has to finalise together with all the others. The secret is as private
as what carries it: whoever can read the job's store can join the job.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from spotspeed.coordinator.address import Endpoint
from spotspeed.coordinator.mpi_world import await_mpi, import_mpi, is_under_mpi
from spotspeed.errors import CoordinationError

_SECRET_BYTES = 32
_SLOT_BYTES = 4096

_PREFIX = "spotspeed/rendezvous"


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
            await_mpi(request, deadline_s, timeout_s, result=duplicate)
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
    """Rank 0 collects what the others put in a torch store, and publishes it with the secret.

        spotspeed/rendezvous/RANK          that rank's token of this attempt, and where it listens
        spotspeed/rendezvous/for/TOKEN     the answer to that token: the name of the meeting
        spotspeed/rendezvous/all/MEETING   the secret, and where everybody listens

    What an attempt has left is never taken for the next one's: a rank takes its own key away when
    it gives up, rank 0 takes away what it has read, and answers go to tokens.
    """

    def __init__(self, store: Any) -> None:
        self.name = f"the job's {type(_innermost(store)).__name__}"
        self._store = second_client(store)

    def meet(self, own: Endpoint, *, world_size: int, timeout_s: float) -> Introduction:
        deadline_s, token = time.monotonic() + timeout_s, secrets.token_hex(16)
        place, ranks = f"{_PREFIX}/{own.rank}", range(world_size)
        self._store.set(place, json.dumps([token, own.encode().decode()]).encode())
        try:
            if own.rank == 0:
                meeting = self._publish(token, ranks, deadline_s)
            else:
                meeting = self._get(f"{_PREFIX}/for/{token}", ranks, deadline_s).decode()
        except CoordinationError:
            self._store.delete_key(place)
            raise
        published = self._get(f"{_PREFIX}/all/{meeting}", ranks, deadline_s)
        secret, texts = json.loads(published)
        found = [Endpoint.decode(text.encode()) for text in texts]
        _check_complete([endpoint.rank for endpoint in found], world_size)
        return Introduction(bytes.fromhex(secret), {each.rank: each for each in found})

    def _publish(self, meeting: str, ranks: Sequence[int], deadline_s: float) -> str:
        """Rank 0 makes one text of everybody's, under the name `meeting`, and tells everybody."""
        words = [json.loads(self._get(f"{_PREFIX}/{rank}", ranks, deadline_s)) for rank in ranks]
        for rank in ranks:
            self._store.delete_key(f"{_PREFIX}/{rank}")
        published = [secrets.token_hex(_SECRET_BYTES), [text for _, text in words]]
        self._store.set(f"{_PREFIX}/all/{meeting}", json.dumps(published).encode())
        for token, _ in words:
            self._store.set(f"{_PREFIX}/for/{token}", meeting.encode())
        return meeting

    def _get(self, key: str, awaited: Sequence[int], deadline_s: float) -> bytes:
        """The value at `key`; the error names those of the `awaited` ranks that have not come."""
        left_s = max(0.001, deadline_s - time.monotonic())
        try:
            self._store.wait([key], timedelta(seconds=left_s))
            return bytes(self._store.get(key))
        except RuntimeError as error:
            missing = [rank for rank in awaited if not self._store.check([f"{_PREFIX}/{rank}"])]
            raise CoordinationError(
                f"the ranks did not meet in {self.name}: ranks {missing[:16]} did not come in "
                f"time; every rank must attach, or ask for the save. The store says: "
                f"{str(error).splitlines()[0]}"
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
