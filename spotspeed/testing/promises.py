"""What a store has promised at each moment, and whether the objects found after a crash keep it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from spotspeed.storage.contract import (
    Leftover,
    ObjectInfo,
    ReadBuffer,
    Storage,
    WriteBuffer,
    Writer,
    as_bytes_view,
)


@dataclass(frozen=True, slots=True)
class Call:
    """The beginning or the return of a call that changes the store."""

    number: int
    kind: Literal["put", "create", "delete", "delete_prefix"]
    key: str
    content: bytes = field(default=b"", repr=False)
    result: bool | None = None
    """None at the beginning; what the call returned (True where it returns nothing) after it."""


class PromisingStorage:
    """Appends a Call to `log` before and after each change that is made through it."""

    def __init__(self, inner: Storage, log: list[object]) -> None:
        self._inner = inner
        self._log = log

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def has_atomic_create(self) -> bool:
        return self._inner.has_atomic_create

    def put(self, key: str, data: ReadBuffer) -> None:
        with self.calling("put", key, bytes(as_bytes_view(data))):
            self._inner.put(key, data)

    def create(self, key: str, data: ReadBuffer) -> bool:
        content = bytes(as_bytes_view(data))
        number = len(self._log)
        self._log.append(Call(number, "create", key, content))
        is_new = self._inner.create(key, data)
        self._log.append(Call(number, "create", key, content, is_new))
        return is_new

    def writer(self, key: str) -> Writer:
        return _PromisingWriter(self, self._inner.writer(key), key)

    def get(self, key: str, limit_bytes: int) -> bytes:
        return self._inner.get(key, limit_bytes)

    def read_into(self, key: str, offset: int, buffer: WriteBuffer) -> None:
        self._inner.read_into(key, offset, buffer)

    def size(self, key: str) -> int:
        return self._inner.size(key)

    def directories(self, prefix: str = "") -> list[str]:
        return self._inner.directories(prefix)

    def delete(self, key: str) -> None:
        with self.calling("delete", key):
            self._inner.delete(key)

    def delete_prefix(self, prefix: str) -> None:
        with self.calling("delete_prefix", prefix):
            self._inner.delete_prefix(prefix)

    def leftovers(self, prefix: str = "") -> list[Leftover]:
        return self._inner.leftovers(prefix)

    def discard(self, leftover: Leftover) -> None:
        self._inner.discard(leftover)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        return self._inner.list(prefix)

    @contextmanager
    def calling(
        self, kind: Literal["put", "delete", "delete_prefix"], key: str, content: bytes = b""
    ) -> Iterator[None]:
        number = len(self._log)
        self._log.append(Call(number, kind, key, content))
        yield
        self._log.append(Call(number, kind, key, content, True))


class _PromisingWriter(Writer):
    def __init__(self, storage: PromisingStorage, inner: Writer, key: str) -> None:
        self._storage, self._inner, self._key = storage, inner, key
        self._content = bytearray()

    @property
    def position(self) -> int:
        return self._inner.position

    def write(self, buffer: ReadBuffer) -> None:
        self._inner.write(buffer)
        self._content += as_bytes_view(buffer)

    def commit(self) -> None:
        with self._storage.calling("put", self._key, bytes(self._content)):
            self._inner.commit()

    def abort(self) -> None:
        self._inner.abort()


@dataclass(slots=True)
class _Promise:
    """What may be found under one key."""

    settled: set[bytes] = field(default_factory=set)
    may_be_absent: bool = True
    in_flight: dict[int, bytes] = field(default_factory=dict)


class Promises:
    """What must and what may be found, after the calls that have been taken."""

    def __init__(self) -> None:
        self._keys: dict[str, _Promise] = {}

    def take(self, call: Call) -> None:
        """Take the next call of the log."""
        if call.kind in ("put", "create"):
            self._change(self._keys.setdefault(call.key, _Promise()), call)
            return
        for key, promise in self._keys.items():
            if key == call.key or (call.kind == "delete_prefix" and key.startswith(f"{call.key}/")):
                promise.may_be_absent = True
                if call.result is not None:
                    promise.settled = set()

    def broken(self, found: Mapping[str, bytes]) -> list[str]:
        """In words, each promise that the objects `found` do not keep."""
        complaints = [f"{key} came from nowhere" for key in found if key not in self._keys]
        for key, promise in self._keys.items():
            allowed = promise.settled | set(promise.in_flight.values())
            if key not in found:
                if not promise.may_be_absent:
                    complaints.append(f"{key} was promised durable and is gone")
            elif found[key] not in allowed:
                what = "is torn or stale" if allowed else "was deleted and is back"
                complaints.append(f"{key} {what}")
        return complaints

    def _change(self, promise: _Promise, call: Call) -> None:
        if call.result is None:
            is_settled = promise.settled and not promise.may_be_absent
            if call.kind == "put" or not is_settled:
                promise.in_flight[call.number] = call.content
            return
        promise.in_flight.pop(call.number, None)
        promise.may_be_absent = False
        if call.result:
            promise.settled = {call.content}
        else:
            promise.settled |= set(promise.in_flight.values())
