"""The transport of the native control thread: `SocketTransport` in csrc/sockets.h.

It speaks the same protocol as the one in Python, and ranks of both kinds understand each other.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping

from spotspeed.coordinator.address import Endpoint
from spotspeed.coordinator.forks import abandon_on_fork
from spotspeed.coordinator.transport import PeerDown, Received, TransportEvent
from spotspeed.errors import CoordinationError, PeerLostError

try:
    from spotspeed import _native
except ImportError:  # not built: bootstrap takes the transport in Python
    HAS_NATIVE = False
else:
    HAS_NATIVE = True

_SLICE_S = 0.2


class NativeTransport:
    """`Transport` without the GIL, until `hand_over` gives it to the native control thread.

    Takes ownership of `listener`; None in a job of one rank. `endpoints` and `secret` as of
    `spotspeed.coordinator.sockets.SocketTransport`.
    """

    def __init__(
        self,
        *,
        rank: int,
        secret: bytes,
        listener: socket.socket | None,
        endpoints: Mapping[int, Endpoint],
        peer_timeout_s: float,
    ) -> None:
        self._rank = rank
        self._endpoints = dict(endpoints)
        own = endpoints.get(rank)
        routes = [
            ((), 0) if own is None else (endpoints[to].seen_from(own), endpoints[to].port)
            for to in range(max(len(endpoints), 1))
        ]
        self._world_size = len(routes)
        self._native = _native.SocketTransport(
            rank, secret, -1 if listener is None else listener.detach(), routes, peer_timeout_s
        )
        abandon_on_fork(self)

    @classmethod
    def of_one_rank(cls) -> NativeTransport:
        """For a job of one rank: no sockets."""
        return cls(rank=0, secret=b"", listener=None, endpoints={}, peer_timeout_s=15.0)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def hand_over(self) -> _native.SocketTransport:
        """The native object, for its control thread; this one is of no use afterwards."""
        return self._native

    def fileno(self) -> int:
        return self._native.fileno()

    def wait_s(self) -> float:
        return self._native.wait_s()

    def connect(self, to: int) -> None:
        self._native.connect(to)

    def send(self, to: int, payload: bytes) -> None:
        self._native.send(to, payload)

    def handle(self) -> list[TransportEvent]:
        return [
            Received(*event) if len(event) == 2 else PeerDown(*event)
            for event in self._native.handle()
        ]

    def establish(self, timeout_s: float) -> None:
        """Complete the star: rank 0 waits for all the others, they wait for rank 0.

        What arrives meanwhile is returned by the next `handle`. Raises PeerLostError when one of
        them is gone, CoordinationError naming those that are missing after `timeout_s`.
        """
        deadline_s = time.monotonic() + timeout_s
        try:
            while missing := self._native.establish_some(_SLICE_S):
                if time.monotonic() >= deadline_s:
                    raise CoordinationError(
                        f"rank {self._rank}: no connection with {len(missing)} of "
                        f"{self._world_size} ranks after {timeout_s:g} s, among them "
                        f"{missing[:8]}; they were to be found at "
                        f"{[self._endpoints[rank].hosts for rank in missing[:8]]}"
                    )
        except RuntimeError as error:
            raise PeerLostError(str(error)) from error
        self._native.wake_if_heard()

    def close(self, *, drain_s: float = 0.0) -> None:
        self._native.close(drain_s)

    def abandon_in_child(self) -> None:
        """Close what a forked child inherited; the parent's transport is not affected."""
        self._native.abandon()
