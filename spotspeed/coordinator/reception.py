"""Accepts connections and bounds what those that have not proved themselves may cost."""

from __future__ import annotations

import math
import select
import socket
from collections.abc import Callable

from spotspeed.coordinator.links import Link
from spotspeed.coordinator.wire import Session

STRANGERS_MAX = 128
"""Connections that may be in their handshake at once, beside one for each rank of the job."""
_ACCEPTS_PER_TURN = 16
_REST_S = 0.2


class Reception:
    """The listening socket and the connections whose handshake is not finished.

    When too many are in their handshake the oldest is closed: a rank, which answers in one round
    trip, passes a flood of strangers, and one that was closed dials again.
    """

    def __init__(
        self,
        epoll: select.epoll,
        listener: socket.socket,
        *,
        world_size: int,
        timeout_s: float,
        new_session: Callable[[], Session],
    ) -> None:
        self.fd = listener.fileno()
        self.due_s = math.inf
        self._epoll = epoll
        self._listener = listener
        self._limit = STRANGERS_MAX + world_size
        self._timeout_s = timeout_s
        self._new_session = new_session
        self._strangers: dict[int, Link] = {}
        epoll.register(listener, select.EPOLLIN)

    def accept(self, now_s: float) -> tuple[list[Link], list[Link]]:
        """(new connections, those to be closed for them), a bounded number at a time."""
        arrived: list[Link] = []
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                break
            except OSError:
                # Out of descriptors: polling the listener again at once would spin.
                self._epoll.modify(self.fd, 0)
                self.due_s = now_s + _REST_S
                break
            link = Link(self._epoll, sock, self._new_session(), now_s)
            self._strangers[link.fd] = link
            arrived.append(link)
        is_resting = self.due_s != math.inf
        excess = max(len(self._strangers) - self._limit, 1 if is_resting else 0)
        return arrived, list(self._strangers.values())[:excess]

    def tick(self, now_s: float) -> list[Link]:
        """Connections whose handshake takes too long, to be closed."""
        if now_s >= self.due_s:
            self._epoll.modify(self.fd, select.EPOLLIN)
            self.due_s = math.inf
        oldest_s = now_s - self._timeout_s
        return [link for link in self._strangers.values() if link.opened_s < oldest_s]

    def forget(self, link: Link) -> None:
        """`link` has proved itself, or is closed."""
        if self._strangers.get(link.fd) is link:
            del self._strangers[link.fd]

    def close(self) -> None:
        """Close the listening socket."""
        self._listener.close()
