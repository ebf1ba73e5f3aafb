"""One TCP connection to a peer: a socket that never blocks, and the session that runs on it."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket

from spotspeed.coordinator.wire import GOODBYE, Frame, Session, WireError

_STRANGER_READ_BYTES = 4096
_PEER_READ_BYTES = 1 << 18
_WRITE_BYTES = 1 << 18


class LinkBroken(Exception):
    """The connection is over; the message says how. Never leaves the transport."""

    def __init__(self, why: str, *, is_refused: bool = False) -> None:
        super().__init__(why)
        self.is_refused = is_refused


class Link:
    """A connection, registered in the owner's epoll from construction to `close`.

    `heard_s` and `sent_s` are when bytes last came and went, on the owner's clock.
    """

    def __init__(
        self, epoll: select.epoll, sock: socket.socket, session: Session, now_s: float
    ) -> None:
        self.session = session
        self.opened_s = self.heard_s = self.sent_s = now_s
        self.fd = sock.fileno()
        self.is_inbound = session.peer is None
        self.is_connecting = not self.is_inbound
        self.is_leaving = False
        self._epoll = epoll
        self._socket = sock
        self._mask = select.EPOLLIN | (select.EPOLLOUT if self.is_connecting else 0)
        self._can_write = True
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        epoll.register(self.fd, self._mask)

    def finish_connecting(self) -> None:
        """Look at the outcome of the connect; raises LinkBroken."""
        error = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise LinkBroken(os.strerror(error), is_refused=error == errno.ECONNREFUSED)
        self.is_connecting = False

    def read(self, now_s: float) -> list[Frame]:
        """Frames that have arrived, of a bounded number of bytes; raises LinkBroken."""
        is_known = self.session.is_authenticated
        try:
            data = self._socket.recv(_PEER_READ_BYTES if is_known else _STRANGER_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise LinkBroken(f"connection lost: {error.strerror}") from error
        if not data:
            raise LinkBroken("connection closed by the other side")
        self.heard_s = now_s
        try:
            return self.session.feed(data)
        except WireError as error:
            raise LinkBroken(f"protocol violation: {error}") from error

    def flush(self, now_s: float) -> None:
        """Write what the socket takes now.

        An error is left to `read`, which first returns what had arrived before it.
        """
        outgoing = self.session.outgoing
        while outgoing and self._can_write and not self.is_connecting:
            try:
                with memoryview(outgoing) as view, view[:_WRITE_BYTES] as part:
                    count = self._socket.send(part)
            except BlockingIOError:
                break
            except OSError:
                self._can_write = False
                break
            del outgoing[:count]
            self.sent_s = now_s
        if not self._can_write:
            outgoing.clear()
        if self.is_leaving and not outgoing:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
        self._watch(bool(outgoing) or self.is_connecting)

    def leave(self, now_s: float) -> None:
        """Say goodbye and end this direction once all is written; `read` then sees the end."""
        if not self.is_leaving:
            self.session.queue(GOODBYE)
            self.is_leaving = True
        self.flush(now_s)

    def close(self) -> None:
        """Close the socket; idempotent."""
        if self._socket.fileno() >= 0:
            self._epoll.unregister(self.fd)
            self._socket.close()

    def abandon(self) -> None:
        """Close a forked child's copy; the parent's epoll, which is shared, is left alone."""
        self._socket.close()

    def _watch(self, wants_write: bool) -> None:
        mask = select.EPOLLIN | (select.EPOLLOUT if wants_write else 0)
        if mask != self._mask:
            self._epoll.modify(self.fd, mask)
            self._mask = mask


def open_link(epoll: select.epoll, host: str, port: int, session: Session, now_s: float) -> Link:
    """Begin to connect to a numeric address; raises LinkBroken where that fails at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise LinkBroken(f"no socket: {error.strerror}") from error
    error_code = sock.connect_ex((host, port))
    if error_code not in (0, errno.EINPROGRESS):
        sock.close()
        is_refused = error_code == errno.ECONNREFUSED
        raise LinkBroken(os.strerror(error_code), is_refused=is_refused)
    return Link(epoll, sock, session, now_s)
