"""The transport over MPI's own messages, for where sockets between nodes are closed.

MPI has no descriptor to sleep on: the thread looks for messages every few milliseconds, which is
what each hop of an agreement costs here. It does not tell of deaths either: a rank that dies is
noticed by its silence, after `peer_timeout_s`. Every frame is [kind, sender, payload], and its tag
is the rank that it is for; MPI keeps frames of one sender to one tag in order.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from spotspeed.coordinator.forks import abandon_on_fork
from spotspeed.coordinator.mpi_world import MpiWorld, calls
from spotspeed.coordinator.transport import (
    QUEUE_BYTES_MAX,
    PeerDown,
    Received,
    TransportEvent,
    check_message,
)
from spotspeed.errors import CoordinationError, PeerLostError

_BUSY_POLL_S = 0.001
_IDLE_POLL_S = 0.005
_BUSY_S = 0.25
_CLOSE_POLL_S = 0.001
_HEADER = struct.Struct("<BI")
_MESSAGE, _HEARTBEAT, _GOODBYE, _GIVEN_UP = range(1, 5)
_FRAMES_PER_TURN = 256

_unfinished: list[Any] = []
"""Sends that a closed transport could not complete: MPI may still read their buffers."""


@dataclass(slots=True)
class _Peer:
    """What this rank knows of another that it is connected with."""

    heard_s: float
    sent_s: float
    sending: deque[tuple[Any, bytes]] = field(default_factory=deque)
    sending_bytes: int = 0
    has_spoken: bool = False


class MpiTransport:
    """`Transport` by point-to-point messages on `world.communicator`, which nobody else may use."""

    def __init__(self, world: MpiWorld, *, rank: int, peer_timeout_s: float) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._communicator, self._places = world.communicator, world.places
        self._rank, self._world_size = rank, len(world.places)
        self._peer_timeout_s = peer_timeout_s
        self._heartbeat_s = min(peer_timeout_s / 5, 1.0)
        self._peers: dict[int, _Peer] = {}
        self._down: set[int] = set()
        self._events: list[TransportEvent] = []
        self._is_closed = False
        self._worked_s = time.monotonic()
        self._busy_until_s = 0.0
        self._wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        abandon_on_fork(self)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def fileno(self) -> int:
        return self._wakeup_fd

    def wait_s(self) -> float:
        if self._events:
            return 0.0
        return _BUSY_POLL_S if time.monotonic() < self._busy_until_s else _IDLE_POLL_S

    def connect(self, to: int) -> None:
        check_message(to, b"", world_size=self._world_size)
        if to != self._rank and not self._is_closed and to not in self._down:
            self._meet(to, is_greeted=True)

    def send(self, to: int, payload: bytes) -> None:
        check_message(to, payload, world_size=self._world_size)
        if self._is_closed or to in self._down:
            return
        if to == self._rank:
            self._report(Received(to, bytes(payload)))
            return
        peer = self._meet(to)
        self._post(to, peer, _MESSAGE, payload)
        if peer.sending_bytes > QUEUE_BYTES_MAX:
            self._lose(to, f"does not read: {peer.sending_bytes} bytes are queued for it")

    def handle(self) -> list[TransportEvent]:
        if not self._is_closed:
            with calls.lock:
                if not calls.is_over:
                    self._work(time.monotonic())
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wakeup_fd)
        events, self._events = self._events, []
        return events

    def establish(self, timeout_s: float) -> None:
        """Complete the star: rank 0 hears all the others, they hear rank 0.

        What arrives meanwhile is returned by the next `handle`. Raises PeerLostError when one of
        them is gone, CoordinationError naming those that are missing after `timeout_s`.
        """
        wanted = range(1, self._world_size) if self._rank == 0 else (0,)
        for rank in wanted:
            self.connect(rank)
        deadline_s = time.monotonic() + timeout_s
        while missing := [rank for rank in wanted if not self._has_spoken(rank)]:
            gone = [event for event in self._events if isinstance(event, PeerDown)]
            if gone:
                raise PeerLostError(f"rank {gone[0].rank} is gone: {gone[0].why}")
            if time.monotonic() >= deadline_s:
                raise CoordinationError(
                    f"rank {self._rank}: nothing by MPI from {len(missing)} of {self._world_size} "
                    f"ranks after {timeout_s:g} s, among them {missing[:8]}"
                )
            time.sleep(_BUSY_POLL_S)
            self._work(time.monotonic())
        if self._events:
            os.eventfd_write(self._wakeup_fd, 1)

    def close(self, *, drain_s: float = 0.0) -> None:
        if self._is_closed:
            return
        for rank, peer in tuple(self._peers.items()):
            self._post(rank, peer, _GOODBYE)
        deadline_s = time.monotonic() + drain_s
        while not calls.is_over and any(peer.sending for peer in self._peers.values()):
            self._complete_sends()
            if time.monotonic() >= deadline_s:
                break
            time.sleep(_CLOSE_POLL_S)
            # What arrives is read and dropped, or two that close at once would wait for each other.
            self._receive(time.monotonic())
        for peer in self._peers.values():
            _unfinished.extend(peer.sending)
        self._is_closed = True
        self._events.clear()
        os.close(self._wakeup_fd)

    def abandon_in_child(self) -> None:
        """A forked child must not touch MPI."""
        if not self._is_closed:
            self._is_closed = True
            os.close(self._wakeup_fd)

    def _meet(self, rank: int, *, is_greeted: bool = False) -> _Peer:
        peer = self._peers.get(rank)
        if peer is None:
            now_s = time.monotonic()
            peer = self._peers[rank] = _Peer(now_s, now_s)
            if is_greeted:
                self._post(rank, peer, _HEARTBEAT)
        return peer

    def _has_spoken(self, rank: int) -> bool:
        peer = self._peers.get(rank)
        return peer is not None and peer.has_spoken

    def _report(self, event: TransportEvent) -> None:
        self._events.append(event)
        os.eventfd_write(self._wakeup_fd, 1)

    def _work(self, now_s: float) -> None:
        self._forgive_own_pause(now_s)
        self._receive(now_s)
        self._complete_sends()
        for rank, peer in tuple(self._peers.items()):
            if now_s - peer.heard_s > self._peer_timeout_s:
                self._lose(rank, f"silent for {now_s - peer.heard_s:.1f} s")
            elif now_s - peer.sent_s >= self._heartbeat_s and not peer.sending:
                self._post(rank, peer, _HEARTBEAT)

    def _forgive_own_pause(self, now_s: float) -> None:
        pause_s = now_s - self._worked_s
        self._worked_s = now_s
        if pause_s > self._heartbeat_s:
            for peer in self._peers.values():
                peer.heard_s += pause_s

    def _receive(self, now_s: float) -> None:
        for _ in range(_FRAMES_PER_TURN):
            try:
                status = self._mpi.Status()
                message = self._communicator.Improbe(tag=self._rank, status=status)
                if message is None:
                    return
                frame = bytearray(status.Get_count(self._mpi.BYTE))
                message.Recv([frame, self._mpi.BYTE])
            except self._mpi.Exception as error:
                self._on_error(error)
                return
            self._busy_until_s = now_s + _BUSY_S
            self._on_frame(bytes(frame), now_s)

    def _on_frame(self, frame: bytes, now_s: float) -> None:
        kind, sender = _HEADER.unpack_from(frame)
        if sender in self._down:
            return
        peer = self._meet(sender, is_greeted=True)
        peer.heard_s, peer.has_spoken = now_s, True
        if kind == _MESSAGE:
            self._report(Received(sender, frame[_HEADER.size :]))
        elif kind == _GOODBYE:
            self._end(sender, "closed its transport", is_orderly=True)
        elif kind == _GIVEN_UP:
            self._end(sender, "has given this rank up and closed the connection")

    def _post(self, to: int, peer: _Peer, kind: int, payload: bytes = b"") -> None:
        frame = _HEADER.pack(kind, self._rank) + payload
        try:
            with calls.lock:
                if calls.is_over:
                    return
                request = self._communicator.Isend(
                    [frame, self._mpi.BYTE], dest=self._places[to], tag=to
                )
        except self._mpi.Exception as error:
            self._end(to, f"MPI cannot reach it: {error}")
            return
        peer.sent_s = time.monotonic()
        self._busy_until_s = max(self._busy_until_s, peer.sent_s + _BUSY_S * (kind == _MESSAGE))
        peer.sending.append((request, frame))
        peer.sending_bytes += len(frame)

    def _complete_sends(self) -> None:
        for rank, peer in tuple(self._peers.items()):
            try:
                while peer.sending and peer.sending[0][0].Test():
                    peer.sending_bytes -= len(peer.sending.popleft()[1])
            except self._mpi.Exception as error:
                peer.sending.popleft()
                self._end(rank, f"MPI cannot reach it: {error}")

    def _on_error(self, error: Any) -> None:
        """Where MPI tells of deaths (ULFM): of whom, it does not say, so silence decides."""
        acknowledge = getattr(self._communicator, "Ack_failed", None)
        if acknowledge is None or error.Get_error_class() != self._mpi.ERR_PROC_FAILED_PENDING:
            raise error
        acknowledge()

    def _lose(self, rank: int, why: str) -> None:
        self._post(rank, self._peers[rank], _GIVEN_UP)
        self._end(rank, why)

    def _end(self, rank: int, why: str, *, is_orderly: bool = False) -> None:
        if rank in self._down:
            return
        self._down.add(rank)
        peer = self._peers.pop(rank, None)
        if peer is not None:
            _unfinished.extend(peer.sending)
        self._report(PeerDown(rank, why, is_orderly))
