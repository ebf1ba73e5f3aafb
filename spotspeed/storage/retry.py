"""A store whose transient failures are tried again: the one place where spotspeed retries.

Waits grow exponentially with full jitter (Brooker, "Exponential Backoff And Jitter", AWS
Architecture Blog, 2015) until one call has used its budget of time.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from spotspeed.errors import ObjectNotFoundError, TransientStorageError, UnreadableError
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
READ_ATTEMPTS = 4
"""How often what a device fails to read is tried, within about two seconds."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to insist; `budget_s` bounds the waiting of one call, not the attempts' own time."""

    first_s: float = 0.1
    """Upper end of the first wait; it doubles each time."""
    longest_s: float = 10.0
    """Upper end of any wait."""
    budget_s: float = 60.0
    """Sum of the waits of one call."""
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    uniform: Callable[[float, float], float] = field(default=random.uniform, repr=False)

    def insist(self, call: Callable[[], T], *, until: threading.Event | None = None) -> T:
        """The result of `call`, repeated while it fails transiently and the budget lasts.

        Once `until` is set, nothing is repeated any more.
        """
        waited_s, bound_s = 0.0, self.first_s
        while True:
            try:
                return call()
            except TransientStorageError:
                wait_s = self.uniform(0.0, min(bound_s, self.longest_s))
                if waited_s + wait_s > self.budget_s or waited_s >= self.budget_s:
                    raise
                if until is None:
                    self.sleep(wait_s)
                elif until.wait(wait_s):
                    raise
                waited_s, bound_s = waited_s + wait_s, bound_s * 2


class RetryingStorage:
    """`inner`, with every call but a writer's repeated while it fails transiently.

    What has been streamed into a writer is gone from the caller's memory, so a writer of an object
    store repeats its parts itself, by the same policy (storage/multipart.py); only opening the
    writer is repeated here.
    """

    def __init__(self, inner: Storage, policy: RetryPolicy | None = None) -> None:
        self._inner = inner
        self._policy = RetryPolicy() if policy is None else policy

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def has_atomic_create(self) -> bool:
        return self._inner.has_atomic_create

    def put(self, key: str, data: ReadBuffer) -> None:
        self._insist(lambda: self._inner.put(key, data))

    def create(self, key: str, data: ReadBuffer) -> bool:
        """See Storage.create; a lost answer to an attempt that succeeded counts as success.

        After a failed attempt, an object that holds exactly `data` is taken for that attempt's.
        """
        attempts = 0

        def attempt() -> bool:
            nonlocal attempts
            attempts += 1
            return self._inner.create(key, data)

        is_new = self._insist(attempt)
        return is_new or (attempts > 1 and self._holds(key, data))

    def writer(self, key: str) -> Writer:
        return self._insist(lambda: self._inner.writer(key))

    def get(self, key: str, limit_bytes: int) -> bytes:
        return self._insist(lambda: self._inner.get(key, limit_bytes))

    def read_into(self, key: str, offset: int, buffer: WriteBuffer) -> None:
        self._insist(lambda: self._inner.read_into(key, offset, buffer))

    def size(self, key: str) -> int:
        return self._insist(lambda: self._inner.size(key))

    def directories(self, prefix: str = "") -> list[str]:
        return self._insist(lambda: self._inner.directories(prefix))

    def delete(self, key: str) -> None:
        self._insist(lambda: self._inner.delete(key))

    def delete_prefix(self, prefix: str) -> None:
        self._insist(lambda: self._inner.delete_prefix(prefix))

    def leftovers(self, prefix: str = "") -> list[Leftover]:
        return self._insist(lambda: self._inner.leftovers(prefix))

    def discard(self, leftover: Leftover) -> None:
        self._insist(lambda: self._inner.discard(leftover))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        return self._insist(lambda: self._inner.list(prefix))

    def _holds(self, key: str, data: ReadBuffer) -> bool:
        view = as_bytes_view(data)
        try:
            return self.size(key) == len(view) and self.get(key, len(view)) == view
        except ObjectNotFoundError:
            return False

    def _insist(self, call: Callable[[], T]) -> T:
        policy = self._policy
        for attempt in range(READ_ATTEMPTS - 1):
            try:
                return policy.insist(call)
            except UnreadableError:
                # A soft mount gives up this way too, and may answer a moment later.
                policy.sleep(policy.uniform(0.0, policy.first_s * 4**attempt))
        return policy.insist(call)
