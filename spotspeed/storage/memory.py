"""A store in this process's memory: for tests, rehearsals and `memory://` URLs."""

from __future__ import annotations

import threading

from spotspeed.errors import FormatError, ObjectNotFoundError
from spotspeed.storage.contract import (
    Leftover,
    ObjectInfo,
    ReadBuffer,
    WriteBuffer,
    Writer,
    as_bytes_view,
    check_key,
    check_prefix,
)


class MemoryStorage:
    """A Storage whose objects last as long as the process ("durable" means no more than that)."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"memory://{self._name}"

    @property
    def has_atomic_create(self) -> bool:
        return True

    def put(self, key: str, data: ReadBuffer) -> None:
        content = bytes(as_bytes_view(data))
        with self._lock:
            self._objects[check_key(key)] = content

    def create(self, key: str, data: ReadBuffer) -> bool:
        content = bytes(as_bytes_view(data))
        with self._lock:
            if check_key(key) in self._objects:
                return False
            self._objects[key] = content
            return True

    def writer(self, key: str) -> MemoryWriter:
        return MemoryWriter(self, check_key(key))

    def get(self, key: str, limit_bytes: int) -> bytes:
        content = self._find(key)
        if len(content) > limit_bytes:
            raise FormatError(
                f"{self.url}/{key}: {len(content)} bytes, at most {limit_bytes} are read"
            )
        return content

    def read_into(self, key: str, offset: int, buffer: WriteBuffer) -> None:
        view, content = as_bytes_view(buffer), self._find(key)
        if offset + len(view) > len(content):
            raise FormatError(
                f"{self.url}/{key}: holds {len(content)} bytes, "
                f"[{offset}, {offset + len(view)}) were asked for; the object is cut short"
            )
        view[:] = memoryview(content)[offset : offset + len(view)]

    def size(self, key: str) -> int:
        return len(self._find(key))

    def directories(self, prefix: str = "") -> list[str]:
        start = len(prefix := _below(prefix))
        rests = (info.key[start:] for info in self.list(prefix))
        return sorted({rest.split("/", 1)[0] for rest in rests if "/" in rest})

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(check_key(key), None)

    def delete_prefix(self, prefix: str) -> None:
        below = f"{check_key(check_prefix(prefix))}/"
        with self._lock:
            self._objects = {k: v for k, v in self._objects.items() if not k.startswith(below)}

    def leftovers(self, prefix: str = "") -> list[Leftover]:
        check_prefix(prefix)
        return []

    def discard(self, leftover: Leftover) -> None:
        """Nothing: what a writer has not committed is in its own memory."""

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        below = _below(prefix)
        with self._lock:
            objects = list(self._objects.items())
        return sorted(ObjectInfo(k, len(v)) for k, v in objects if k.startswith(below))

    def _find(self, key: str) -> bytes:
        try:
            return self._objects[check_key(key)]
        except KeyError:
            raise ObjectNotFoundError(f"read {self.url}/{key}: there is no such object") from None


class MemoryWriter(Writer):
    """Collects an object until `commit` puts it into the store."""

    def __init__(self, storage: MemoryStorage, key: str) -> None:
        self._storage = storage
        self._key = key
        self._content: bytearray | None = bytearray()
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    def write(self, buffer: ReadBuffer) -> None:
        view = as_bytes_view(buffer)
        self._open_content().extend(view)
        self._position += len(view)

    def commit(self) -> None:
        content = self._open_content()
        self.abort()
        self._storage.put(self._key, content)

    def abort(self) -> None:
        self._content = None

    def _open_content(self) -> bytearray:
        if self._content is None:
            raise ValueError(f"{self._storage.url}/{self._key}: the writer is closed")
        return self._content


def _below(prefix: str) -> str:
    prefix = check_prefix(prefix)
    return f"{prefix}/" if prefix else ""
