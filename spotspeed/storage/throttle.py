"""Holds calls of a store back, so that all of them together keep to a bandwidth."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from spotspeed.storage.intercept import Call

T = TypeVar("T")


@dataclass(slots=True)
class Throttle:
    """An Interceptor by which bytes go in turn, as over one line of `bytes_per_s`.

    A call waits until those before it would have gone over the line, then goes at once; so no more
    than one call is ahead of the line. What a `get` brings is known only afterwards, and is charged
    to the next.
    """

    bytes_per_s: float
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    _free_at: float = field(default=0.0, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0:
            raise ValueError(f"a bandwidth of {self.bytes_per_s} bytes a second")

    def make(self, call: Call, run: Callable[[], T]) -> T:
        self._take(call.sent_bytes + call.wanted_bytes)
        result = run()
        if isinstance(result, bytes):
            self._charge(len(result))
        return result

    def _take(self, size_bytes: int) -> None:
        wait_s = self._charge(size_bytes) if size_bytes else 0.0
        if wait_s > 0:
            self.sleep(wait_s)

    def _charge(self, size_bytes: int) -> float:
        """Seconds until the line is free for these bytes, which are its next ones."""
        with self._lock:
            now = self.clock()
            begin = max(now, self._free_at)
            self._free_at = begin + size_bytes / self.bytes_per_s
            return begin - now
