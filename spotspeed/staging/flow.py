"""The chunks of one save in their order: claimed with a slot each, filled, handed to the saver."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from spotspeed.core.chunks import StreamLayout
from spotspeed.core.saver_protocol import Chunks, Need
from spotspeed.staging.client import SaverSession

BATCH_BYTES = 16 * 1024 * 1024
"""Chunks are claimed, copied and handed to the saver in batches of up to about this size."""
FIRST_BATCH_BYTES = 2 * 1024 * 1024
"""The size of the first batch; each is twice the last. The disk is not to wait for a whole one."""


class ChunkFlow:
    """One save, number `number` of `session`; any thread may use it, but one at a time `claim`s."""

    def __init__(self, session: SaverSession, layout: StreamLayout, number: int) -> None:
        self.session, self.layout, self.number = session, layout, number
        self.stalled_s = 0.0
        """Seconds spent waiting for a free slot."""
        self._batch_bytes = min(FIRST_BATCH_BYTES, BATCH_BYTES)
        self._next = 0
        self._filled: dict[int, int] = {}
        self._sent = self._sent_bytes = 0
        self._has_ended = self._is_closed = False
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()

    @property
    def sent_bytes(self) -> int:
        """Bytes of the chunks that have been handed over."""
        with self._lock:
            return self._sent_bytes

    def claim(self, deadline: float | None) -> dict[int, int]:
        """The next chunks and a slot for each; waits only for the first slot."""
        claimed: dict[int, int] = {}
        size = 0
        while self._next < len(self.layout.chunks) and size < self._batch_bytes:
            slot = self.session.pool.acquire(timeout_s=0)
            if slot is None and not claimed:
                slot = self._wait_slot(deadline)
            if slot is None:
                break
            claimed[self._next] = slot
            size += self.layout.chunks[self._next].size_bytes
            self._next += 1
        self._batch_bytes = min(2 * self._batch_bytes, BATCH_BYTES)
        return claimed

    def fill(self, claimed: dict[int, int]) -> bool:
        """The bytes of these chunks are in their slots; False when nobody wants them any more."""
        with self._lock:
            if not self._is_closed:
                self._filled |= claimed
                return True
        self.release(claimed.values())
        return False

    def release(self, slots: Iterable[int]) -> None:
        """Slots that the saver has not been told of are free again."""
        self.session.pool.release(slots)

    def send(self, *, eager: bool) -> bool:
        """Hand over the filled chunks that follow those already sent.

        Unless `eager`, a few are kept until there are more. True for the one caller behind whom
        nothing is left: the save can be ended.
        """
        with self._send_lock:
            with self._lock:
                if self._is_closed or self._has_ended:
                    return False
                stop = self._sent
                while stop in self._filled:
                    stop += 1
                is_last = stop == len(self.layout.chunks)
                chunks = self.layout.chunks[self._sent : stop]
                size = sum(chunk.size_bytes for chunk in chunks)
                if not (eager or is_last or size >= min(BATCH_BYTES, self._sent_bytes)):
                    return False
                self._sent_bytes += size
                first, self._sent, self._has_ended = self._sent, stop, is_last
                slots = tuple(self._filled.pop(chunk) for chunk in range(first, stop))
            if slots:
                self.session.send(Chunks(self.number, first, slots))
            return is_last

    def close(self) -> None:
        """Nothing is to follow: slots that the saver does not know of go back to the pool."""
        with self._lock:
            self._is_closed = True
            slots, self._filled = list(self._filled.values()), {}
        self.release(slots)
        self.session.pool.wake()

    def _wait_slot(self, deadline: float | None) -> int | None:
        """Send what is filled, and wait until the saver gives a slot back."""
        began = time.monotonic()
        self.send(eager=True)
        pool = self.session.pool
        self.session.send(Need(min(len(self.layout.chunks) - self._next, pool.slot_count)))
        timeout_s = None if deadline is None else max(0.0, deadline - began)
        slot = pool.acquire(give_up=lambda: self._is_closed, timeout_s=timeout_s)
        self.stalled_s += time.monotonic() - began
        return slot
