"""Tells what is asked of a store: each call with its bytes, its time and its failure."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from spotspeed.storage.intercept import Call

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Traced:
    """A call that has been made."""

    call: Call
    elapsed_s: float
    received_bytes: int = 0
    """What came back, also of a read that was asked for by size."""
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Tracer:
    """An Interceptor that tells `on_call`, on the thread of the caller."""

    on_call: Callable[[Traced], None]

    def make(self, call: Call, run: Callable[[], T]) -> T:
        began = time.perf_counter()
        try:
            result = run()
        except BaseException as error:
            self.on_call(Traced(call, time.perf_counter() - began, error=error))
            raise
        received = len(result) if isinstance(result, bytes) else call.wanted_bytes
        self.on_call(Traced(call, time.perf_counter() - began, received))
        return result


@dataclass(slots=True)
class Tally:
    """Sums over calls, for `Tracer(tally.add)`; what failed counts as a call and no bytes."""

    calls: Counter[str] = field(default_factory=Counter)
    """By operation."""
    bytes_read: int = 0
    bytes_written: int = 0
    elapsed_s: float = 0.0
    """Of all calls; more than the time that passed where several were made at once."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, traced: Traced) -> None:
        """Take one call; any thread."""
        with self._lock:
            self.calls[traced.call.operation] += 1
            self.elapsed_s += traced.elapsed_s
            if traced.error is None:
                self.bytes_read += traced.received_bytes
                self.bytes_written += traced.call.sent_bytes
