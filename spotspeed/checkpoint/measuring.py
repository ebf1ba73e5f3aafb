"""How fast a store and the memory are, by a small trial."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from math import inf

from spotspeed.storage.contract import Storage

PROBE_KEY = "probe/speed-"
PROBE_S = 1.0
PROBE_BYTES_MAX = 512 * 1024 * 1024
CHUNK_BYTES = 4 * 1024 * 1024


def measure_store(
    storage: Storage, *, limit_s: float = PROBE_S, limit_bytes: int = PROBE_BYTES_MAX
) -> tuple[float, float]:
    """(bytes per second made durable, seconds until a small object is durable) of one writer.

    Writes for `limit_s` or `limit_bytes`, at least one chunk (opening alone may take longer than
    that), and removes what it has written.
    """
    key, chunk = f"{PROBE_KEY}{secrets.token_hex(8)}", os.urandom(min(CHUNK_BYTES, limit_bytes))
    began = time.monotonic()
    try:
        with storage.writer(key) as writer:
            writer.write(chunk)
            while time.monotonic() - began < limit_s and writer.position < limit_bytes:
                writer.write(chunk)
            size_bytes = writer.position
            writer.commit()
        write_s = time.monotonic() - began
        began = time.monotonic()
        storage.put(f"{key}.seal", b"sealed")
        seal_s = time.monotonic() - began
    finally:
        storage.delete(key)
        storage.delete(f"{key}.seal")
    return size_bytes / write_s, seal_s


def has_room(storage: Storage, size_bytes: int) -> bool:
    """Whether so many bytes fit; a store that is no directory always has room."""
    return "://" in storage.url or shutil.disk_usage(storage.url).free >= size_bytes


def measure_copy(size_bytes: int = 64 * 1024 * 1024) -> float:
    """Bytes per second from memory to memory on one core, pages being there."""
    source, target = bytearray(os.urandom(4096) * (size_bytes // 4096)), bytearray(size_bytes)
    best_s = inf
    for _ in range(3):
        began = time.monotonic()
        memoryview(target)[:] = source
        best_s = min(best_s, time.monotonic() - began)
    return size_bytes / best_s
