"""Sends to a saver that may not read for a while, without making anybody wait for it."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

STUCK_S = 30.0
"""A saver that takes nothing for so long is given up: it is stopped, or as good as dead."""

OnSent = Callable[[], None]


class Outbox:
    """Frames on their way into `sock`, in order; any thread may send.

    What the kernel takes at once is sent by the caller, the rest by a thread that lives while
    there is a rest. `on_lost` is told when the other side is gone or takes nothing for `stuck_s`.
    """

    def __init__(
        self, sock: socket.socket, on_lost: Callable[[OSError], object], *,
        stuck_s: float = STUCK_S,
    ) -> None:  # fmt: skip
        self._socket, self._on_lost, self._stuck_s = sock, on_lost, stuck_s
        self._pending: deque[tuple[memoryview, OnSent | None]] = deque()
        self._changed = threading.Condition()

    def send(self, frame: bytes, on_sent: OnSent | None = None) -> None:
        """Send `frame` when those before it are sent; returns at once.

        `on_sent` is called, on some thread, when the kernel has all of it: from then on the other
        side gets it even if this process dies. Raises OSError when the other side is gone.
        """
        view = memoryview(frame)
        with self._changed:
            if not self._pending:
                view = self._push(view)
            is_sent = not view
            if not is_sent:
                self._pending.append((view, on_sent))
                if len(self._pending) == 1:
                    thread = threading.Thread(target=self._run, name="spotspeed-outbox")
                    thread.daemon = True
                    thread.start()
        if is_sent and on_sent is not None:
            on_sent()

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is left to be sent; False after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout_s)

    def _push(self, view: memoryview) -> memoryview:
        """Give the kernel what it takes now, and return the rest."""
        with contextlib.suppress(BlockingIOError):
            while view:
                view = view[self._socket.send(view, socket.MSG_DONTWAIT) :]
        return view

    def _run(self) -> None:
        """Body of the thread: push the rest as the other side reads."""
        try:
            while self._push_next():
                pass
        except OSError as error:
            with self._changed:
                self._pending.clear()
                self._changed.notify_all()
            self._on_lost(error)

    def _push_next(self) -> bool:
        """Send the first frame that waits; False when no other is left behind it."""
        deadline = time.monotonic() + self._stuck_s
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT)
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise OSError(f"it has taken no message for {self._stuck_s:g} s")
            poller.poll(left_s * 1000)
            with self._changed:
                before, on_sent = self._pending[0]
                rest = self._push(before)
                if rest:
                    self._pending[0] = rest, on_sent
                    if len(rest) < len(before):
                        deadline = time.monotonic() + self._stuck_s
                    continue
                self._pending.popleft()
                is_more = bool(self._pending)
                self._changed.notify_all()
            if on_sent is not None:
                on_sent()
            return is_more
