"""Reads from the node's own disk what verifies there, so that only the rest comes from `path`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from spotspeed.checkpoint.sealed import OpenShard, open_receipt, open_shard
from spotspeed.codec import digest
from spotspeed.core.index import ChunkRecord
from spotspeed.core.manifest import Manifest
from spotspeed.errors import CorruptionError, StorageError
from spotspeed.storage.contract import Storage

_REFUSED = (CorruptionError, StorageError)


class Stored(Protocol):
    """A chunk of a span: what is needed to find and to check it."""

    @property
    def record(self) -> ChunkRecord: ...


class Near:
    """The copies of one checkpoint's shards in the tier of this node; any thread may use it.

    Nothing here is trusted: what is returned has the digest that the checkpoint at `path` lists.
    """

    def __init__(self, storage: Storage, directory: str) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._bytes_read = self._refused = 0
        try:
            self._keys = frozenset(info.key for info in storage.list(directory))
        except StorageError:
            self._keys = frozenset()

    @property
    def bytes_read(self) -> int:
        """Bytes of chunks that were read here and verified."""
        return self._bytes_read

    @property
    def refused(self) -> int:
        """Chunks of files that are here which do not verify, and so came from `path`."""
        return self._refused

    def open_shard(self, manifest: Manifest, rank: int) -> OpenShard | None:
        """Rank `rank`'s shard, when its receipt and index are here and verify."""
        if manifest.receipts[rank].path not in self._keys:
            return None
        try:
            return open_shard(self._storage, open_receipt(self._storage, manifest, rank))
        except _REFUSED:
            return None

    def read(self, path: str, chunks: Sequence[Stored], buffer: memoryview) -> list[int]:
        """Fill `buffer`, from the first chunk's place in the file on, with what is here.

        Returns the positions, among `chunks`, of those that are not here or do not verify; their
        bytes in `buffer` are undefined.
        """
        if path not in self._keys:
            return list(range(len(chunks)))
        start = chunks[0].record.file_offset
        is_whole = self._fill(path, start, buffer)
        missing: list[int] = []
        bytes_read = 0
        for position, chunk in enumerate(chunks):
            record = chunk.record
            frame = buffer[record.file_offset - start :][: record.stored_size]
            is_there = is_whole or self._fill(path, record.file_offset, frame)
            if not is_there or digest(frame) != record.stored_digest:
                missing.append(position)
            else:
                bytes_read += record.stored_size
        with self._lock:
            self._bytes_read += bytes_read
            self._refused += len(missing)
        return missing

    def _fill(self, path: str, offset: int, buffer: memoryview) -> bool:
        try:
            self._storage.read_into(path, offset, buffer)
        except _REFUSED:
            return False
        return True
