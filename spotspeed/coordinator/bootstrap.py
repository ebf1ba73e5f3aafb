"""Connects the ranks of a job: from torch.distributed's rank numbers to a transport that is up."""

from __future__ import annotations

import logging
import os

from spotspeed.config import CoordinatorConfig
from spotspeed.coordinator.address import endpoint_of, open_listener
from spotspeed.coordinator.local import LocalTransport
from spotspeed.coordinator.native_transport import HAS_NATIVE, NativeTransport
from spotspeed.coordinator.rendezvous import Rendezvous, find_rendezvous
from spotspeed.coordinator.sockets import SocketTransport
from spotspeed.coordinator.transport import Transport

_logger = logging.getLogger("spotspeed")
TIMEOUT_S = 120.0


def connect_ranks(
    settings: CoordinatorConfig, rank: int, world_size: int, *, timeout_s: float | None = None
) -> Transport:
    """The transport that `settings` ask for; see `bootstrap`. Raises ConfigError without MPI."""
    timeout_s = TIMEOUT_S if timeout_s is None else timeout_s
    if settings.transport is None or world_size == 1:
        return bootstrap(rank=rank, world_size=world_size, timeout_s=timeout_s,
                         peer_timeout_s=settings.peer_timeout_s)  # fmt: skip
    # Not at the top: nobody else needs mpi4py.
    from spotspeed.coordinator.mpi_transport import MpiTransport
    from spotspeed.coordinator.mpi_world import join_mpi

    world = join_mpi(rank, world_size, timeout_s)
    transport = MpiTransport(world, rank=rank, peer_timeout_s=settings.peer_timeout_s)
    try:
        transport.establish(timeout_s)
    except BaseException:
        transport.close()
        raise
    _logger.info("coordinator: rank %d of %d, messages by MPI, found through MPI (%d ranks)",
                 rank, world_size, world_size)  # fmt: skip
    return transport


def bootstrap(
    *,
    rank: int,
    world_size: int,
    peer_timeout_s: float = 15.0,
    timeout_s: float = TIMEOUT_S,
    rendezvous: Rendezvous | None = None,
    is_native: bool = HAS_NATIVE,
) -> Transport:
    """A transport among all ranks, each connected with rank 0; every rank calls it, in step.

    `rank` and `world_size` are torch.distributed's. `rendezvous` None takes MPI where the job runs
    under it, else the default process group's store; the choice is logged. Not `is_native`: the
    transport and the control thread in Python, as where the extension was not built. Hand the
    transport to its thread soon: a rank that does not call `handle` for `peer_timeout_s` is lost to
    the others.

    Raises CoordinationError when a rank does not come within `timeout_s` (of each of two phases),
    PeerLostError when one is gone.
    """
    if world_size == 1:
        _logger.info("coordinator: one rank, no transport")
        return NativeTransport.of_one_rank() if is_native else LocalTransport()
    master_host = os.environ.get("MASTER_ADDR")
    listener = open_listener(master_host=master_host)
    try:
        own = endpoint_of(rank, listener, master_host=master_host)
        meeting = rendezvous or find_rendezvous(world_size)
        known = meeting.meet(own, world_size=world_size, timeout_s=timeout_s)
    except BaseException:  # whatever ends this, a signal's exception too: no socket stays open
        listener.close()
        raise
    transport = (NativeTransport if is_native else SocketTransport)(
        rank=rank, secret=known.secret, listener=listener, endpoints=known.endpoints,
        peer_timeout_s=peer_timeout_s,
    )  # fmt: skip
    try:
        transport.establish(timeout_s)
    except BaseException:  # as above
        transport.close()
        raise
    _logger.info(
        "coordinator: rank %d of %d, %s sockets at %s port %d, found through %s",
        rank, world_size, "native" if is_native else "Python", ", ".join(own.hosts), own.port,
        meeting.name,
    )  # fmt: skip
    return transport
