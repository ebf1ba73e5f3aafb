"""The transport of a job of one rank: no sockets, and only messages to itself."""

from __future__ import annotations

import os

from spotspeed.coordinator.transport import Received, TransportEvent, check_message


class LocalTransport:
    """`Transport` for `world_size` 1."""

    def __init__(self) -> None:
        self._wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._inbox: list[TransportEvent] = []
        self._is_closed = False

    @property
    def rank(self) -> int:
        return 0

    @property
    def world_size(self) -> int:
        return 1

    def fileno(self) -> int:
        return self._wakeup_fd

    def wait_s(self) -> float:
        return 60.0

    def connect(self, to: int) -> None:
        check_message(to, b"", world_size=1)

    def send(self, to: int, payload: bytes) -> None:
        check_message(to, payload, world_size=1)
        if self._is_closed:
            return
        self._inbox.append(Received(0, bytes(payload)))
        os.eventfd_write(self._wakeup_fd, 1)

    def handle(self) -> list[TransportEvent]:
        events, self._inbox = self._inbox, []
        if events and not self._is_closed:
            os.eventfd_read(self._wakeup_fd)
        return events

    def close(self, *, drain_s: float = 0.0) -> None:
        if not self._is_closed:
            self._is_closed = True
            os.close(self._wakeup_fd)
