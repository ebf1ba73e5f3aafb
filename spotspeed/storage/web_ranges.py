"""Parts of objects on web servers, some of which send the whole object whatever is asked for."""

from __future__ import annotations

import threading
from typing import Any

from spotspeed import events
from spotspeed.errors import StorageError

WHOLE_BYTES = 1 << 30
"""The largest object that is fetched whole for the sake of its parts, and held in memory."""


class WebRanges:
    """Reads parts of objects through fsspec's `filesystem`; may be used from several threads.

    Where the server ignores ranges the last object read is held, so that one who reads an object
    from end to end fetches it once.
    """

    def __init__(self, filesystem: Any) -> None:
        self._fs = filesystem
        self._lock = threading.Lock()
        self._has_ranges: bool | None = None
        self._held: tuple[str, bytes] = ("", b"")

    def read(self, path: str, start: int, stop: int) -> bytes:
        """What the object has of [start, stop); StorageError when it is too large for its server.

        Other failures are those of the client behind fsspec.
        """
        if start == 0:
            return bytes(self._fs.cat_file(path, start=start, end=stop)[:stop])
        with self._lock:
            if self._has_ranges is None:
                self._has_ranges = self._serves_ranges(path)
                if not self._has_ranges:
                    cause = "it ignores range requests, so each file is fetched whole"
                    events.emit(events.Lost(f"reading in parts from the server of {path}", cause))
            if not self._has_ranges:
                return self._whole(path)[start:stop]
        return bytes(self._fs.cat_file(path, start=start, end=stop))

    def forget(self, path: str) -> None:
        """Fetch `path` anew when it is read the next time."""
        with self._lock:
            if self._held[0] == path:
                self._held = ("", b"")

    def _serves_ranges(self, path: str) -> bool:
        """Whether the server sends the last byte alone; only the answer's head is read if not."""
        size = self._size(path)
        try:
            with self._fs.open(path, "rb", block_size=1 << 16, cache_type="none", size=size) as f:
                f.seek(size - 1)
                return len(f.read(1)) == 1
        except ValueError:
            return False

    def _whole(self, path: str) -> bytes:
        if self._held[0] != path:
            size = self._size(path)
            if size > WHOLE_BYTES:
                raise StorageError(
                    f"{path}: has {size} bytes, and its server ignores range requests, so that no "
                    f"part can be read alone; serve it with one that answers them (nginx, Apache, "
                    f"a bucket), or copy the checkpoint to a disk"
                )
            self._held = (path, bytes(self._fs.cat_file(path)))
        return self._held[1]

    def _size(self, path: str) -> int:
        size = self._fs.info(path)["size"]
        if size is None:
            raise StorageError(f"{path}: its server does not say how long it is")
        return int(size)
