"""Chooses for all saves of a node whether their chunks are compressed, from what was measured."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from spotspeed.agent.metering import Meter
from spotspeed.core.compression import Choice, Seen, look, told
from spotspeed.core.manifest import ShardRecord

_logger = logging.getLogger("spotspeed")


@dataclass(slots=True)
class Waits:
    """For what the writer of one file has waited, in seconds; used by one thread."""

    chunks_s: float = 0.0
    encode_s: float = 0.0
    writers: int = 1
    """How many files were being written when this one began, with this one."""

    @contextlib.contextmanager
    def for_chunks(self) -> Iterator[None]:
        """Around a wait for a chunk to be staged."""
        began = time.monotonic()
        yield
        self.chunks_s += time.monotonic() - began

    @contextlib.contextmanager
    def for_encoders(self) -> Iterator[None]:
        """Around a wait for a chunk to be encoded."""
        began = time.monotonic()
        yield
        self.encode_s += time.monotonic() - began


class Chooser:
    """The choice for one store; any thread may use it.

    At first a directory is taken for a fast disk, which needs no compression, and any other store
    for a slow one that bills its bytes.
    """

    def __init__(self, url: str, encoders: int) -> None:
        self._url = url
        self._choice = Choice("://" in url, encoders)
        self._writers = 0
        self._lock = threading.Lock()

    def is_encoded(self, store_bytes_s: float | None = None) -> bool:
        """Whether the next file is to be encoded; the store's speed may be known from elsewhere."""
        if store_bytes_s is not None:
            self._change(lambda choice: told(choice, store_bytes_s))
        return self._choice.is_encoded

    @contextlib.contextmanager
    def writing(self) -> Iterator[Waits]:
        """Around the storing of one file."""
        waits = Waits()
        with self._lock:
            self._writers += 1
            waits.writers = self._writers
        try:
            yield waits
        finally:
            with self._lock:
                self._writers -= 1

    def saw(self, waits: Waits, meter: Meter, shard: ShardRecord, *, is_encoded: bool) -> None:
        """One file has been stored; to be called while it still is `writing`."""
        with self._lock:
            writers = max(waits.writers, self._writers)
        seen = Seen(is_encoded, shard.raw_bytes, shard.size_bytes, waits.chunks_s, waits.encode_s,
                    meter.writing_s, meter.encoding_s, writers, meter.encoders)  # fmt: skip
        self._change(lambda choice: look(choice, seen))

    def _change(self, decide: Callable[[Choice], Choice]) -> None:
        with self._lock:
            before, self._choice = self._choice, decide(self._choice)
            after = self._choice
        if before.is_encoded is not after.is_encoded:
            word = "compressed" if after.is_encoded else "stored as they are"
            _logger.info("%s: chunks are %s from now on: %s", self._url, word, after.reason)
