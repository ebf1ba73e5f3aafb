"""Several transports in one process, driven by the calling thread, for what runs on them."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from spotspeed.coordinator.address import Endpoint, network_namespace
from spotspeed.coordinator.local import LocalTransport
from spotspeed.coordinator.mpi_transport import MpiTransport
from spotspeed.coordinator.mpi_world import MpiWorld, import_mpi
from spotspeed.coordinator.native_transport import NativeTransport
from spotspeed.coordinator.rendezvous import Introduction
from spotspeed.coordinator.sockets import SocketTransport
from spotspeed.coordinator.transport import PeerDown, Received, Transport, TransportEvent
from spotspeed.errors import CoordinationError

SECRET = b"a secret of this test"
KINDS: dict[str, tuple[type[SocketTransport] | type[NativeTransport], ...]] = {
    "python": (SocketTransport,),
    "native": (NativeTransport,),
    "mixed": (SocketTransport, NativeTransport),
}
"""Transports of the ranks, in turn."""
kind = "native"
"""What `socket_network` makes; tests set it."""


class Network:
    """`transports` by rank, and what each has reported so far in `events`."""

    def __init__(self, transports: dict[int, Transport]) -> None:
        self.transports = transports
        self.events: dict[int, list[TransportEvent]] = {rank: [] for rank in transports}

    def run(
        self,
        until: Callable[[], bool],
        *,
        timeout_s: float = 20.0,
        without: Collection[int] = (),
    ) -> None:
        """Drive all transports but those of `without`; AssertionError after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        driven = {rank: each for rank, each in self.transports.items() if rank not in without}
        poller = select.poll()
        for transport in driven.values():
            poller.register(transport.fileno(), select.POLLIN)
        while True:
            for rank, transport in driven.items():
                self.events[rank] += transport.handle()
            if until():
                return
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"not reached in {timeout_s} s; events: {self.events}"
            wait_s = min(left_s, *(transport.wait_s() for transport in driven.values()))
            poller.poll(wait_s * 1000)

    def run_for(self, duration_s: float, *, without: Collection[int] = ()) -> None:
        """Drive all transports but those of `without` for so long."""
        end_s = time.monotonic() + duration_s
        self.run(lambda: time.monotonic() >= end_s, without=without, timeout_s=duration_s + 20)

    def payloads(self, rank: int, sender: int) -> list[bytes]:
        """What `rank` has received from `sender`, in order."""
        found = [event for event in self.events[rank] if isinstance(event, Received)]
        return [event.payload for event in found if event.sender == sender]

    def downs(self, rank: int) -> list[PeerDown]:
        """The peers that `rank` has seen go, in order."""
        return [event for event in self.events[rank] if isinstance(event, PeerDown)]


def listeners(world_size: int) -> tuple[dict[int, socket.socket], dict[int, Endpoint]]:
    """A loopback listener for each rank, and the endpoints that lead to them."""
    sockets, endpoints = {}, {}
    for rank in range(world_size):
        sockets[rank] = socket.create_server(("127.0.0.1", 0), backlog=256)
        sockets[rank].setblocking(False)
        port = sockets[rank].getsockname()[1]
        endpoints[rank] = Endpoint(rank, network_namespace(), ("127.0.0.1",), port)
    return sockets, endpoints


def transport_type(rank: int) -> type[SocketTransport] | type[NativeTransport]:
    """What a rank of a network of this `kind` has."""
    return KINDS[kind][rank % len(KINDS[kind])]


def single_transport() -> Transport:
    """The transport of a job of one rank, of this `kind`."""
    if kind == "python":
        return LocalTransport()
    return NativeTransport.of_one_rank()


@contextlib.contextmanager
def socket_network(world_size: int, *, peer_timeout_s: float = 15.0) -> Iterator[Network]:
    """So many ranks over loopback, or over MPI's, not yet connected with each other."""
    if kind == "mpi":
        with _mpi_network(world_size, peer_timeout_s) as network:
            yield network
        return
    sockets, endpoints = listeners(world_size)
    network = Network({
        rank: transport_type(rank)(
            rank=rank, secret=SECRET, listener=sockets[rank], endpoints=endpoints,
            peer_timeout_s=peer_timeout_s,
        )
        for rank in range(world_size)
    })  # fmt: skip
    try:
        yield network
    finally:
        for transport in network.transports.values():
            transport.close()


@contextlib.contextmanager
def _mpi_network(world_size: int, peer_timeout_s: float) -> Iterator[Network]:
    """Ranks that all have this process's place in MPI: their tags keep them apart."""
    mpi = import_mpi()
    if not mpi.Is_initialized():
        mpi.Init_thread(mpi.THREAD_MULTIPLE)
    world = MpiWorld(mpi.COMM_SELF.Dup(), (0,) * world_size)
    network = Network({
        rank: MpiTransport(world, rank=rank, peer_timeout_s=peer_timeout_s)
        for rank in range(world_size)
    })  # fmt: skip
    try:
        yield network
    finally:
        for transport in network.transports.values():
            transport.close()


class DirectoryRendezvous:
    """Ranks of one machine meet in a directory: processes without torch or MPI."""

    name = "a directory"

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def meet(self, own: Endpoint, *, world_size: int, timeout_s: float) -> Introduction:
        """Publish `own` as a file and wait for the others' files."""
        partial = self._directory / f"{own.rank}.partial"
        partial.write_bytes(own.encode())
        partial.rename(self._directory / f"{own.rank}")
        deadline_s = time.monotonic() + timeout_s
        paths = {rank: self._directory / str(rank) for rank in range(world_size)}
        while missing := [rank for rank, path in paths.items() if not path.exists()]:
            if time.monotonic() > deadline_s:
                raise CoordinationError(f"ranks {missing} did not come within {timeout_s:g} s")
            time.sleep(0.01)
        found = {rank: Endpoint.decode(path.read_bytes()) for rank, path in paths.items()}
        return Introduction(SECRET, found)
