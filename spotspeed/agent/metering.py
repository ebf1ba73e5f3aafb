"""What it takes to write one shard: the seconds of encoding alone and of writing alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from spotspeed.core.manifest import Receipt
from spotspeed.core.saver_protocol import Cost

P = ParamSpec("P")
T = TypeVar("T")


class Meter:
    """The seconds of one attempt; `encoding` runs on any thread, `writing` on one.

    A store that takes parts side by side works on while nobody writes to it, so there the time from
    the first byte to the last is what counts: it is never more than the store needed, and more than
    that only when the bytes came slower than it could take them.
    """

    def __init__(self, encoders: int, *, is_side_by_side: bool) -> None:
        self.encoders, self._is_side_by_side = encoders, is_side_by_side
        self._encoding_s = self._writing_s = 0.0
        self._first_s: float | None = None
        self._last_s = 0.0
        self._lock = threading.Lock()

    @property
    def encoding_s(self) -> float:
        """What encoding has taken, all threads together."""
        with self._lock:
            return self._encoding_s

    @property
    def writing_s(self) -> float:
        """How long the writer has waited for its store."""
        return self._writing_s

    def encoding(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`call`, timed as encoding."""
        began = time.monotonic()
        try:
            return call(*args, **kwargs)
        finally:
            with self._lock:
                self._encoding_s += time.monotonic() - began

    def writing(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`call`, timed as writing."""
        began = time.monotonic()
        self._first_s = began if self._first_s is None else self._first_s
        try:
            return call(*args, **kwargs)
        finally:
            self._last_s = time.monotonic()
            self._writing_s += self._last_s - began

    def cost(self, save: int, receipt: Receipt, *, is_near: bool) -> Cost:
        """The whole, as the rank is told."""
        write_s = self._writing_s
        if self._is_side_by_side and self._first_s is not None:
            write_s = self._last_s - self._first_s
        shard = receipt.shard
        with self._lock:
            encode_s = self._encoding_s / self.encoders
        return Cost(save, is_near, shard.raw_bytes, shard.size_bytes, encode_s, write_s)
