"""The contract of a store: named immutable objects below one root, durable when a call returns.

Every implementation passes tests/conformance/test_storage.py. Three rules hold for all of them.

Names. A key is a relative POSIX path ("step-000000000010.e000001.a/rank-00000.shard"), checked by
`check_key` before anything is touched. Objects being written have no name: `list`, `size`, `get`
and `read_into` see an object either whole or not at all.

Buffers. Whatever is passed in belongs to the caller, is only borrowed during the call and may be
reused or changed as soon as the call returns; nothing is retained. Any contiguous buffer serves
(bytes, bytearray, memoryview; pass `memoryview(array).cast("B")` for others), read as bytes.

Durability. When `put`, `create` (returning True) or `Writer.commit` return, the object's bytes, its
name and every directory on the way from the root are on stable storage (fsynced, or acknowledged
by the object store). When `delete` returns, the name is gone for good. Nothing is promised before.

Every call blocks, and may be made from any thread. Failures are StorageError (facts in the text),
TransientStorageError (a later attempt may do; `storage.retry` does it), ObjectNotFoundError
(no such object) or FormatError (the object is shorter or longer than it must be).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from spotspeed.errors import StorageError

ReadBuffer = bytes | bytearray | memoryview
"""What can be written: contiguous, read as bytes."""
WriteBuffer = bytearray | memoryview
"""What can be read into: contiguous and writable."""

MAX_KEY_BYTES = 1024
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,199}")


@dataclass(frozen=True, slots=True, order=True)
class ObjectInfo:
    """One stored object."""

    key: str
    size_bytes: int


@dataclass(frozen=True, slots=True, order=True)
class Leftover:
    """What a write that has not ended has put into the store: no object, and without a key."""

    path: str
    """Relative to the root: of a hidden file, or of the object that an upload in parts is for."""
    size_bytes: int
    """0 where the store does not say."""
    modified_unix_s: float
    """When something was last written to it, or when it began, by the store's own clock."""
    upload: str = ""
    """The store's name for an upload in parts."""


class Writer(Protocol):
    """One object being written in order; it appears under its key only by `commit`.

    Used as a context manager, which is written here once for those that say to be a Writer;
    leaving it without `commit` aborts. One thread at a time.
    """

    @property
    def position(self) -> int:
        """Bytes taken so far."""

    def write(self, buffer: ReadBuffer) -> None:
        """Append the whole of `buffer`, which the caller may reuse on return."""

    def write_all(self, buffers: Sequence[ReadBuffer]) -> None:
        """Append several buffers in their order, as `write` would; cheaper where many are small."""
        for buffer in buffers:
            self.write(buffer)

    def commit(self) -> None:
        """Publish what was written under the key, replacing an older object; durable on return.

        Call at most once; the writer is closed afterwards, also when this raises.
        """

    def abort(self) -> None:
        """Discard what was written; nothing appears. Harmless after `commit` or `abort`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()


class Storage(Protocol):
    """Objects below one root."""

    @property
    def url(self) -> str:
        """Where this is, for messages: an absolute directory or an fsspec URL."""

    @property
    def has_atomic_create(self) -> bool:
        """Whether `create` decides races; if not, its callers must read back and compare."""

    def put(self, key: str, data: ReadBuffer) -> None:
        """Store `data` under `key`, replacing an older object atomically; durable on return."""

    def create(self, key: str, data: ReadBuffer) -> bool:
        """Store `data` unless `key` exists; False, with nothing changed, when it does.

        Of several callers at most one gets True where `has_atomic_create`. Durable when True.
        What can be seen beside `key` when this is called is durable before `key` exists.
        """

    def writer(self, key: str) -> Writer:
        """A writer for a large object; parts of it may reach the store before `commit`."""

    def get(self, key: str, limit_bytes: int) -> bytes:
        """The whole object; FormatError when it is larger than `limit_bytes`."""

    def read_into(self, key: str, offset: int, buffer: WriteBuffer) -> None:
        """Fill all of `buffer` from byte `offset`; FormatError when the object ends before."""

    def size(self, key: str) -> int:
        """Size of the object in bytes."""

    def directories(self, prefix: str = "") -> list[str]:
        """Names (one component each, sorted) of the directories right below `prefix`.

        A local directory that holds no object may be named too.
        """

    def delete(self, key: str) -> None:
        """Remove the object; one that does not exist is no error."""

    def delete_prefix(self, prefix: str) -> None:
        """Remove every object below directory `prefix`, and leftovers of unfinished writes there.

        Not atomic: a crash leaves any part of them. `prefix` may not be empty.
        """

    def leftovers(self, prefix: str = "") -> list[Leftover]:
        """What writes that have not ended have put below directory `prefix`, at any depth, sorted.

        Whether their writers live is not known. A store that cannot tell, or removes such things by
        itself, says nothing.
        """

    def discard(self, leftover: Leftover) -> None:
        """Remove it for good; a writer that lives fails then. One that is gone is no error."""

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object below directory `prefix` ("" is the root), at any depth, sorted by key.

        Keys are relative to the root. A prefix with nothing below it gives an empty list.
        """


def check_key(key: str) -> str:
    """`key` if it is a relative path of safe components; raises StorageError with the rule."""
    components = key.split("/") if isinstance(key, str) else []
    if (
        not components
        or len(key) > MAX_KEY_BYTES
        or not all(_COMPONENT.fullmatch(part) and ".." not in part for part in components)
    ):
        raise StorageError(
            f"key {key!r} is not usable: a relative path of components with at most 200 letters, "
            f"digits or . _ + = @ -, none empty, hidden or with '..', {MAX_KEY_BYTES} bytes in all"
        )
    return key


def check_prefix(prefix: str) -> str:
    """`prefix` without trailing slash, if it is empty or a usable key; else StorageError."""
    trimmed = prefix.rstrip("/") if isinstance(prefix, str) else prefix
    return trimmed if trimmed == "" else check_key(trimmed)


def as_bytes_view(buffer: ReadBuffer) -> memoryview:
    """`buffer` as a flat view of bytes; raises ValueError when it is not contiguous."""
    view = memoryview(buffer)
    if view.format == "B" and view.ndim == 1 and view.contiguous:
        return view
    if not view.c_contiguous:
        raise ValueError("the buffer is not contiguous: pass a contiguous copy of it")
    return view.cast("B")
