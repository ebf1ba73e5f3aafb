"""Streams one large object to a store that takes it in parts: several on their way at a time.

Memory is bounded: PARALLEL parts on their way and one being filled, whatever the object's size.
Each part is repeated by itself when it fails transiently, so a stream survives what a store or a
network does now and then; the caller's bytes were copied into the part, and are not needed again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

from spotspeed import events
from spotspeed.errors import ObjectNotFoundError, SpotSpeedError, StorageError
from spotspeed.storage.contract import ReadBuffer, Writer, as_bytes_view
from spotspeed.storage.part_uploads import MAX_PARTS, PART_BYTES, PartUpload
from spotspeed.storage.retry import RetryPolicy

T = TypeVar("T")
PARALLEL = 4
"""Parts of one object on their way at a time, so 80 MiB of memory a writer at most."""


@dataclass(frozen=True, slots=True)
class Target:
    """One key of a store, as a writer needs it."""

    place: str
    """Where it is, for messages."""
    failing: Callable[[str], AbstractContextManager[None]]
    """Around an operation, named for messages: what a client raises becomes a SpotSpeedError."""
    begin: Callable[[], PartUpload]
    put: Callable[[bytearray], None]
    """Store a small object in one request; translated already, like `size`."""
    size: Callable[[], int]
    part_bytes: int = PART_BYTES


class MultipartWriter(Writer):
    """A Writer that sends parts of `target.part_bytes` on threads of its own."""

    def __init__(self, target: Target, policy: RetryPolicy) -> None:
        self._target, self._policy = target, policy
        self._part: bytearray | None = bytearray()
        self._count = 0
        self._position = 0
        self._upload: PartUpload | None = None
        self._crew: list[threading.Thread] = []
        self._waiting: deque[tuple[int, bytearray]] = deque()
        self._unsent = 0
        self._failure: BaseException | None = None
        self._is_over = threading.Event()
        self._changed = threading.Condition()

    @property
    def position(self) -> int:
        return self._position

    def write(self, buffer: ReadBuffer) -> None:
        """See Writer.write; waits while PARALLEL parts are on their way."""
        view = as_bytes_view(buffer)
        while len(view):
            part = self._open_part()
            taken = view[: self._target.part_bytes - len(part)]
            part += taken
            view = view[len(taken) :]
            self._position += len(taken)
            if len(part) == self._target.part_bytes:
                self._dispatch(part)

    def commit(self) -> None:
        part = self._open_part()
        try:
            if self._upload is None:
                self._policy.insist(lambda: self._target.put(part))
            else:
                if part:
                    self._dispatch(part)
                self._wait_sent()
                self._complete(self._upload)
        finally:
            self.abort()

    def abort(self) -> None:
        """See Writer.abort; waits for the parts that are on their way, so that none comes later."""
        self._part = None
        with self._changed:
            self._is_over.set()
            self._changed.notify_all()
        for thread in self._crew:
            thread.join()
        self._waiting.clear()
        upload, self._upload = self._upload, None
        if upload is not None:
            try:
                self._insist("clean up after", upload.abort)
            except SpotSpeedError as error:
                # Its parts are invisible but may cost money until the bucket's own rule expires
                # them, or the directory is removed.
                what = f"unfinished upload of {self._target.place}"
                events.emit(events.Lost(what, f"not discarded: {error}"))

    def _open_part(self) -> bytearray:
        if self._part is None:
            raise ValueError(f"{self._target.place}: the writer is closed")
        return self._part

    def _dispatch(self, part: bytearray) -> None:
        """Hand a part to the crew; waits until one of those before it has been sent."""
        if self._count == MAX_PARTS:
            raise StorageError(
                f"write {self._target.place} failed: the store takes {MAX_PARTS} parts of "
                f"{self._target.part_bytes} bytes and not more; use more ranks"
            )
        if self._upload is None:
            self._upload = self._insist("write", self._target.begin)
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._unsent < PARALLEL)
            self._check()
            self._waiting.append((self._count, part))
            self._unsent += 1
            if len(self._crew) < self._unsent:
                thread = threading.Thread(target=self._send_all, name="upload", daemon=True)
                self._crew.append(thread)
                thread.start()
            self._changed.notify_all()
        self._count += 1
        self._part = bytearray()

    def _send_all(self) -> None:
        """Body of a thread: send parts until the writer is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_over.is_set())
                if self._is_over.is_set():
                    return
                number, part = self._waiting.popleft()
            failure = self._send(number, part)
            with self._changed:
                self._unsent -= 1
                self._failure = self._failure or failure
                self._changed.notify_all()

    def _send(self, number: int, part: bytearray) -> BaseException | None:
        upload = self._upload
        assert upload is not None
        try:
            self._insist(f"write part {number} of", lambda: upload.send(number, part))
        except BaseException as error:  # raised again by the thread that writes
            return error
        return None

    def _wait_sent(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._unsent)
            self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _complete(self, upload: PartUpload) -> None:
        """Publish; an upload that is unknown after a lost answer has been published by it."""
        attempts = 0

        def complete() -> None:
            nonlocal attempts
            attempts += 1
            upload.complete(self._count)

        try:
            self._insist("commit", complete)
        except ObjectNotFoundError:
            if attempts == 1 or self._policy.insist(self._target.size) != self._position:
                raise

    def _insist(self, operation: str, call: Callable[[], T]) -> T:
        """`call` with its errors translated, repeated while that helps and the writer is open."""

        def attempt() -> T:
            with self._target.failing(operation):
                return call()

        return self._policy.insist(attempt, until=self._is_over)
