"""The transport over TCP: a star around rank 0 that any other pair joins on demand.

Every connection is mutually authenticated with the job's secret (wire.py); a stranger's ends
without touching anything else. A rank that was itself paused (SIGSTOP, a suspended machine) sees it
in the gap between two calls, and does not hold the silence against the others.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from spotspeed.coordinator.address import Endpoint
from spotspeed.coordinator.dialing import Dial
from spotspeed.coordinator.forks import abandon_on_fork
from spotspeed.coordinator.links import Link, LinkBroken, open_link
from spotspeed.coordinator.reception import Reception
from spotspeed.coordinator.transport import (
    QUEUE_BYTES_MAX,
    PeerDown,
    Received,
    TransportEvent,
    check_message,
)
from spotspeed.coordinator.wire import GOODBYE, HEARTBEAT, MESSAGE, Frame, Session
from spotspeed.errors import CoordinationError, PeerLostError


@dataclass(slots=True)
class _Peer:
    """What this rank knows of another; `sending` is the one of `links` that carries messages."""

    links: list[Link] = field(default_factory=list)
    sending: Link | None = None
    waiting: deque[bytes] = field(default_factory=deque)
    waiting_bytes: int = 0
    dial: Dial | None = None
    attempt: Link | None = None
    is_down: bool = False


class SocketTransport:
    """`Transport` over TCP.

    Takes ownership of `listener`. `endpoints` says where every rank listens; `secret` is known to
    the ranks of this job only.
    """

    def __init__(
        self,
        *,
        rank: int,
        secret: bytes,
        listener: socket.socket,
        endpoints: Mapping[int, Endpoint],
        peer_timeout_s: float,
    ) -> None:
        self._rank = rank
        self._world_size = len(endpoints)
        self._secret = secret
        self._endpoints = dict(endpoints)
        self._peer_timeout_s = peer_timeout_s
        self._heartbeat_s = min(peer_timeout_s / 5, 1.0)
        self._tick_s = self._heartbeat_s / 2
        self._peers: dict[int, _Peer] = {}
        self._links: dict[int, Link] = {}
        self._events: list[TransportEvent] = []
        self._is_working = self._is_closing = self._is_closed = False
        self._worked_s = self._next_tick_s = time.monotonic()
        self._wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wakeup_fd, select.EPOLLIN)
        self._reception = Reception(
            self._epoll, listener, world_size=self._world_size, timeout_s=peer_timeout_s,
            new_session=lambda: self._session(None),
        )  # fmt: skip
        abandon_on_fork(self)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def fileno(self) -> int:
        return self._epoll.fileno()

    def wait_s(self) -> float:
        return 0.0 if self._events else max(0.0, self._due_s() - time.monotonic())

    def connect(self, to: int) -> None:
        check_message(to, b"", world_size=self._world_size)
        peer = self._peer(to)
        is_busy = bool(peer.is_down or peer.links or peer.dial)
        if to == self._rank or is_busy or self._is_closed:
            return
        hosts = self._endpoints[to].seen_from(self._endpoints[self._rank])
        now_s = time.monotonic()
        peer.dial = Dial(hosts, now_s=now_s, timeout_s=self._peer_timeout_s)
        self._attempt(to, peer.dial, now_s)

    def send(self, to: int, payload: bytes) -> None:
        check_message(to, payload, world_size=self._world_size)
        if self._is_closed:
            return
        if to == self._rank:
            self._report(Received(to, bytes(payload)))
            return
        self.connect(to)
        peer = self._peer(to)
        if peer.is_down:
            return
        if peer.sending is None:
            peer.waiting.append(bytes(payload))
            peer.waiting_bytes += len(payload)
            queued_bytes = peer.waiting_bytes
        else:
            peer.sending.session.queue(MESSAGE, payload)
            peer.sending.flush(time.monotonic())
            queued_bytes = len(peer.sending.session.outgoing)
        if queued_bytes > QUEUE_BYTES_MAX:
            self._down(to, f"does not read: {queued_bytes} bytes are queued for it")

    def handle(self) -> list[TransportEvent]:
        if not self._is_closed:
            self._turn()
        events, self._events = self._events, []
        return events

    def establish(self, timeout_s: float) -> None:
        """Complete the star: rank 0 waits for all the others, they wait for rank 0.

        What arrives meanwhile is returned by the next `handle`. Raises PeerLostError when one of
        them is gone, CoordinationError naming those that are missing after `timeout_s`.
        """
        wanted = range(1, self._world_size) if self._rank == 0 else (0,)
        deadline_s = time.monotonic() + timeout_s
        if self._rank != 0:
            self.connect(0)
        while missing := [rank for rank in wanted if not self._peer(rank).links]:
            for event in self._events:
                if isinstance(event, PeerDown) and event.rank in missing:
                    raise PeerLostError(f"rank {event.rank} is gone: {event.why}")
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise CoordinationError(
                    f"rank {self._rank}: no connection with {len(missing)} of {self._world_size} "
                    f"ranks after {timeout_s:g} s, among them {missing[:8]}; they were to be found "
                    f"at {[self._endpoints[rank].hosts for rank in missing[:8]]}"
                )
            self._wait(left_s)
            self._turn()

        if self._events:
            os.eventfd_write(self._wakeup_fd, 1)

    def close(self, *, drain_s: float = 0.0) -> None:
        if self._is_closed:
            return
        self._is_closing = True
        now_s = time.monotonic()
        deadline_s = now_s + drain_s
        for peer in self._peers.values():
            if peer.sending is not None:
                peer.sending.leave(now_s)
            elif not peer.waiting:
                self._disconnect(peer)
        while any(not peer.is_down for peer in self._peers.values()):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            self._wait(left_s)
            self._turn()
        for link in tuple(self._links.values()):
            self._close_link(link)
        self._is_closed = True
        self._close_descriptors()

    def abandon_in_child(self) -> None:
        """Close what a forked child inherited; the parent's transport is not affected."""
        if not self._is_closed:
            self._is_closed = True
            for link in self._links.values():
                link.abandon()
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        self._epoll.close()
        self._reception.close()
        os.close(self._wakeup_fd)

    def _peer(self, rank: int) -> _Peer:
        return self._peers.setdefault(rank, _Peer())

    def _session(self, target: int | None) -> Session:
        return Session(self._secret, rank=self._rank, world_size=self._world_size, target=target)

    def _report(self, event: TransportEvent) -> None:
        self._events.append(event)
        if not self._is_working:
            os.eventfd_write(self._wakeup_fd, 1)

    def _due_s(self) -> float:
        peers = self._peers.values()
        dials = [peer.dial.due_s for peer in peers if peer.dial and not peer.attempt]
        return min([self._next_tick_s, self._reception.due_s, *dials])

    def _wait(self, left_s: float) -> None:
        poller = select.poll()
        poller.register(self._epoll.fileno(), select.POLLIN)
        wait_s = max(0.0, min(left_s, self._due_s() - time.monotonic()))
        poller.poll(math.ceil(1000 * wait_s))

    def _turn(self) -> None:
        self._is_working = True
        try:
            self._work(time.monotonic())
        finally:
            self._is_working = False

    def _work(self, now_s: float) -> None:
        self._forgive_own_pause(now_s)
        for fd, mask in self._epoll.poll(0, len(self._links) + 2):
            if fd == self._wakeup_fd:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
            elif fd == self._reception.fd:
                arrived, excess = self._reception.accept(now_s)
                self._links.update((link.fd, link) for link in arrived)
                for link in excess:
                    self._close_link(link)
            elif fd in self._links:
                self._on_ready(self._links[fd], mask, now_s)
        for rank, peer in tuple(self._peers.items()):
            if peer.dial and not peer.attempt and now_s >= peer.dial.due_s:
                self._attempt(rank, peer.dial, now_s)
        if now_s >= min(self._next_tick_s, self._reception.due_s):
            self._tick(now_s)

    def _forgive_own_pause(self, now_s: float) -> None:
        pause_s = now_s - self._worked_s - self._tick_s
        self._worked_s = now_s
        if pause_s <= self._tick_s:
            return
        for link in self._links.values():
            link.heard_s += pause_s
            link.opened_s += pause_s
        for peer in self._peers.values():
            if peer.dial is not None:
                peer.dial.shift(pause_s)

    def _tick(self, now_s: float) -> None:
        self._next_tick_s = now_s + self._tick_s
        for link in self._reception.tick(now_s):
            self._close_link(link)
        for rank, peer in tuple(self._peers.items()):
            for link in tuple(peer.links):
                if now_s - link.heard_s > self._peer_timeout_s:
                    self._down(rank, f"silent for {now_s - link.heard_s:.1f} s")
                    break
                if now_s - link.sent_s >= self._heartbeat_s - self._tick_s / 2:
                    self._beat(link, now_s)
            if peer.attempt is not None:
                self._check_attempt(rank, peer, peer.attempt, now_s)

    def _beat(self, link: Link, now_s: float) -> None:
        if not link.session.outgoing and not link.is_leaving:
            link.session.queue(HEARTBEAT)
        link.flush(now_s)

    def _check_attempt(self, rank: int, peer: _Peer, attempt: Link, now_s: float) -> None:
        # Once we have proved ourselves the other side may count on this connection: only the
        # dial's own deadline may end it.
        limit_s = self._peer_timeout_s * (1.0 if attempt.session.has_answered else 1 / 3)
        if now_s - attempt.opened_s > limit_s:
            self._attempt_failed(rank, peer, LinkBroken("no answer"), now_s)

    def _attempt(self, rank: int, dial: Dial, now_s: float) -> None:
        peer = self._peers[rank]
        port = self._endpoints[rank].port
        try:
            link = open_link(self._epoll, dial.next_host(), port, self._session(rank), now_s)
        except LinkBroken as broken:
            self._attempt_failed(rank, peer, broken, now_s)
            return
        self._links[link.fd] = peer.attempt = link

    def _attempt_failed(self, rank: int, peer: _Peer, broken: LinkBroken, now_s: float) -> None:
        if peer.attempt is not None:
            self._close_link(peer.attempt)
            peer.attempt = None
        if peer.dial is None:
            return
        peer.dial.failed(str(broken), is_refused=broken.is_refused, now_s=now_s)
        if peer.dial.is_given_up:
            why = f"cannot be reached at {peer.dial.why}"
            peer.dial = None
            if not peer.links:
                self._down(rank, why)

    def _on_ready(self, link: Link, mask: int, now_s: float) -> None:
        was_authenticated = link.session.is_authenticated
        try:
            if link.is_connecting:
                link.finish_connecting()
            frames = link.read(now_s) if mask & ~select.EPOLLOUT else []
        except LinkBroken as broken:
            self._on_broken(link, broken, now_s)
            return
        if link.session.is_authenticated and not was_authenticated:
            self._on_authenticated(link)
        for frame in frames:
            if link.fd not in self._links:
                return
            self._on_frame(link, frame)
        if self._links.get(link.fd) is link:
            link.flush(now_s)

    def _on_frame(self, link: Link, frame: Frame) -> None:
        assert link.session.peer is not None
        if frame.kind == MESSAGE:
            self._report(Received(link.session.peer, frame.payload))
        elif frame.kind == GOODBYE:
            self._down(link.session.peer, "closed its transport", is_orderly=True)

    def _on_authenticated(self, link: Link) -> None:
        assert link.session.peer is not None
        peer = self._peer(link.session.peer)
        self._reception.forget(link)
        if peer.attempt is link:
            peer.attempt = peer.dial = None
        elif peer.is_down or any(other.is_inbound for other in peer.links):
            self._close_link(link)
            return
        peer.links.append(link)
        if peer.sending is None:
            self._send_waiting(peer, link)

    def _send_waiting(self, peer: _Peer, link: Link) -> None:
        peer.sending = link
        while peer.waiting:
            link.session.queue(MESSAGE, peer.waiting.popleft())
        peer.waiting_bytes = 0
        if self._is_closing:
            link.leave(time.monotonic())

    def _on_broken(self, link: Link, broken: LinkBroken, now_s: float) -> None:
        rank = link.session.peer
        peer = self._peers.get(rank) if rank is not None else None
        if rank is not None and peer is not None and link is peer.attempt:
            self._attempt_failed(rank, peer, broken, now_s)
        elif rank is not None and peer is not None and link in peer.links:
            self._down(rank, str(broken))
        else:
            self._close_link(link)

    def _down(self, rank: int, why: str, *, is_orderly: bool = False) -> None:
        peer = self._peer(rank)
        if not peer.is_down:
            self._disconnect(peer)
            self._report(PeerDown(rank, why, is_orderly))

    def _disconnect(self, peer: _Peer) -> None:
        peer.is_down = True
        for link in (*peer.links, *([peer.attempt] if peer.attempt else [])):
            self._close_link(link)
        peer.links.clear()
        peer.waiting.clear()
        peer.sending = peer.attempt = peer.dial = None

    def _close_link(self, link: Link) -> None:
        self._reception.forget(link)
        if self._links.get(link.fd) is link:
            del self._links[link.fd]
        link.close()
