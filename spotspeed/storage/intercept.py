"""A store each of whose calls is handed to somebody: to be timed, counted or held back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from spotspeed.storage.contract import (
    Leftover,
    ObjectInfo,
    ReadBuffer,
    Storage,
    WriteBuffer,
    Writer,
    as_bytes_view,
)

T = TypeVar("T")
Operation = Literal[
    "put", "create", "open", "write", "commit", "get", "read", "size", "delete", "list",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a store or of one of its writers."""

    operation: Operation
    key: str
    """Or the directory, where the call is about one."""
    sent_bytes: int = 0
    wanted_bytes: int = 0
    """Bytes to be read, where the caller says how many."""


class Interceptor(Protocol):
    """Makes calls, and whatever it likes before and after; any thread may come."""

    def make(self, call: Call, run: Callable[[], T]) -> T:
        """`run()`, once."""


class InterceptedStorage:
    """`inner`, with every call, also those of its writers, made by `by`."""

    def __init__(self, inner: Storage, by: Interceptor) -> None:
        self._inner, self._by = inner, by

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def has_atomic_create(self) -> bool:
        return self._inner.has_atomic_create

    def put(self, key: str, data: ReadBuffer) -> None:
        call = Call("put", key, len(as_bytes_view(data)))
        self._by.make(call, lambda: self._inner.put(key, data))

    def create(self, key: str, data: ReadBuffer) -> bool:
        call = Call("create", key, len(as_bytes_view(data)))
        return self._by.make(call, lambda: self._inner.create(key, data))

    def writer(self, key: str) -> Writer:
        inner = self._by.make(Call("open", key), lambda: self._inner.writer(key))
        return InterceptedWriter(inner, key, self._by)

    def get(self, key: str, limit_bytes: int) -> bytes:
        return self._by.make(Call("get", key), lambda: self._inner.get(key, limit_bytes))

    def read_into(self, key: str, offset: int, buffer: WriteBuffer) -> None:
        call = Call("read", key, wanted_bytes=len(as_bytes_view(buffer)))
        self._by.make(call, lambda: self._inner.read_into(key, offset, buffer))

    def size(self, key: str) -> int:
        return self._by.make(Call("size", key), lambda: self._inner.size(key))

    def directories(self, prefix: str = "") -> list[str]:
        return self._by.make(Call("list", prefix), lambda: self._inner.directories(prefix))

    def delete(self, key: str) -> None:
        self._by.make(Call("delete", key), lambda: self._inner.delete(key))

    def delete_prefix(self, prefix: str) -> None:
        self._by.make(Call("delete", prefix), lambda: self._inner.delete_prefix(prefix))

    def leftovers(self, prefix: str = "") -> list[Leftover]:
        return self._by.make(Call("list", prefix), lambda: self._inner.leftovers(prefix))

    def discard(self, leftover: Leftover) -> None:
        self._by.make(Call("delete", leftover.path), lambda: self._inner.discard(leftover))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        return self._by.make(Call("list", prefix), lambda: self._inner.list(prefix))


class InterceptedWriter(Writer):
    """A writer of an InterceptedStorage."""

    def __init__(self, inner: Writer, key: str, by: Interceptor) -> None:
        self._inner, self._key, self._by = inner, key, by

    @property
    def position(self) -> int:
        return self._inner.position

    def write(self, buffer: ReadBuffer) -> None:
        call = Call("write", self._key, len(as_bytes_view(buffer)))
        self._by.make(call, lambda: self._inner.write(buffer))

    def commit(self) -> None:
        self._by.make(Call("commit", self._key), self._inner.commit)

    def abort(self) -> None:
        self._inner.abort()
