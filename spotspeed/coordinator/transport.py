"""The contract by which ranks exchange small control messages, whatever carries them.

One thread owns a transport: it blocks in `select.poll()` on `fileno()` and on whatever else it
waits for, and calls `handle()` when that descriptor is readable or `wait_s()` seconds have passed:

    poller.register(transport.fileno(), select.POLLIN)
    while running:
        poller.poll(math.ceil(min(transport.wait_s(), own_wait_s) * 1000))
        for event in transport.handle():
            match event:
                case Received(sender, payload): ...
                case PeerDown(rank, why, is_orderly): ...

Ranks are those of torch.distributed. Failures are fail-stop: once a rank has been reported down,
nothing more is received from it and what is sent to it is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

MESSAGE_BYTES_MAX = 1 << 20
"""Largest payload of one message; `send` raises ValueError above it."""
QUEUE_BYTES_MAX = 16 << 20
"""Most bytes kept for one peer that does not read; beyond it the peer is down."""


@dataclass(frozen=True, slots=True)
class Received:
    """One message; those of one sender arrive once each, in the order they were sent."""

    sender: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class PeerDown:
    """`rank` is gone: reported once, after everything received from it.

    `is_orderly` says that it closed its transport itself, everything it had sent having arrived;
    otherwise it died, was silent for `peer_timeout_s`, cannot be reached or broke the protocol.
    """

    rank: int
    why: str
    is_orderly: bool = False


TransportEvent = Received | PeerDown


class Transport(Protocol):
    """Ordered, reliable messages between the ranks of one job; all methods belong to one thread."""

    @property
    def rank(self) -> int:
        """This process's rank in torch.distributed."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""
        ...

    def fileno(self) -> int:
        """A descriptor that polls readable (POLLIN) whenever `handle` has something to do.

        It stays the same until `close`; connections come and go behind it.
        """
        ...

    def wait_s(self) -> float:
        """Seconds until `handle` must be called even though nothing is readable (heartbeats)."""
        ...

    def connect(self, to: int) -> None:
        """Begin to connect to `to`, so that its death is noticed; nothing when already connected.

        `bootstrap` connects every rank with rank 0. A rank that is not connected is not watched.
        """
        ...

    def send(self, to: int, payload: bytes) -> None:
        """Queue `payload` for `to` and return at once; connects on demand.

        A message to this rank itself is received by the next `handle`. One to a rank that is down
        is dropped: its PeerDown has been or will be reported. Raises ValueError for a rank that
        does not exist or a payload above MESSAGE_BYTES_MAX.
        """
        ...

    def handle(self) -> list[TransportEvent]:
        """Do all work that is due without blocking, and return what happened, in order."""
        ...

    def close(self, *, drain_s: float = 0.0) -> None:
        """Write out what is queued, for at most `drain_s` seconds, say goodbye, close all.

        Idempotent. What is sent later is dropped; `fileno` is no more.
        """
        ...


def check_message(to: int, payload: bytes, *, world_size: int) -> None:
    """Raise ValueError unless `payload` may be sent to rank `to`."""
    if not 0 <= to < world_size:
        raise ValueError(f"rank {to} does not exist: the job has ranks 0 to {world_size - 1}")
    if len(payload) > MESSAGE_BYTES_MAX:
        raise ValueError(
            f"a message of {len(payload)} bytes for rank {to}: the limit is {MESSAGE_BYTES_MAX}"
        )
