"""What is retried, for how long, and what an unanswered create means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from spotspeed.errors import (
    FormatError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
    UnreadableError,
)
from spotspeed.storage.contract import ReadBuffer
from spotspeed.storage.memory import MemoryStorage
from spotspeed.storage.retry import READ_ATTEMPTS, RetryingStorage, RetryPolicy


class Flaky(MemoryStorage):
    """Fails so many times before each call, or after it has been done."""

    def __init__(self, failures: int, *, after: bool = False) -> None:
        super().__init__()
        self.left, self.after, self.calls = failures, after, 0

    def put(self, key: str, data: ReadBuffer) -> None:
        self._run(lambda: MemoryStorage.put(self, key, data))

    def create(self, key: str, data: ReadBuffer) -> bool:
        return bool(self._run(lambda: MemoryStorage.create(self, key, data)))

    def get(self, key: str, limit_bytes: int) -> bytes:
        return bytes(self._run(lambda: MemoryStorage.get(self, key, limit_bytes)))

    def _run(self, call: Callable[[], Any]) -> Any:
        self.calls += 1
        if self.left == 0:
            return call()
        self.left -= 1
        if self.after:
            call()
        raise TransientStorageError("try again")


def policy(waits: list[float], *, budget_s: float = 60.0) -> RetryPolicy:
    return RetryPolicy(
        first_s=1.0, longest_s=8.0, budget_s=budget_s, sleep=waits.append,
        uniform=lambda low, high: high,
    )  # fmt: skip


def test_a_transient_failure_is_tried_again_with_growing_waits() -> None:
    waits: list[float] = []
    storage = RetryingStorage(Flaky(6), policy(waits))
    storage.put("k", b"x")
    assert waits == [1, 2, 4, 8, 8, 8]
    assert storage.get("k", 10) == b"x"


def test_the_budget_ends_it_with_the_last_failure() -> None:
    waits: list[float] = []
    flaky = Flaky(10_000)
    with pytest.raises(TransientStorageError, match="try again"):
        RetryingStorage(flaky, policy(waits, budget_s=20.0)).put("k", b"x")
    assert sum(waits) <= 20.0
    assert flaky.calls == len(waits) + 1


def test_waits_are_drawn_between_nothing_and_the_bound() -> None:
    drawn: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return 0.0

    quick = RetryPolicy(first_s=0.5, sleep=lambda _: None, uniform=uniform)
    RetryingStorage(Flaky(3), quick).put("k", b"x")
    assert drawn == [(0.0, 0.5), (0.0, 1.0), (0.0, 2.0)]


@pytest.mark.parametrize("error", [StorageError, ObjectNotFoundError, FormatError])
def test_nothing_else_is_retried(error: type[Exception]) -> None:
    class Broken(MemoryStorage):
        calls = 0

        def put(self, key: str, data: ReadBuffer) -> None:
            self.calls += 1
            raise error("no")

    broken = Broken()
    with pytest.raises(error):
        RetryingStorage(broken, policy([])).put("k", b"x")
    assert broken.calls == 1


def test_a_create_whose_answer_was_lost_is_a_success() -> None:
    assert RetryingStorage(Flaky(2, after=True), policy([])).create("k", b"mine")


def test_a_create_that_another_won_meanwhile_is_not() -> None:
    flaky = Flaky(1)
    MemoryStorage.put(flaky, "k", b"theirs")
    assert not RetryingStorage(flaky, policy([])).create("k", b"mine")
    assert flaky.get("k", 10) == b"theirs"


def test_the_same_bytes_of_another_count_only_after_a_failure() -> None:
    flaky = Flaky(0)
    storage = RetryingStorage(flaky, policy([]))
    assert storage.create("k", b"same")
    assert not storage.create("k", b"same")


@pytest.mark.parametrize("failures", [1, READ_ATTEMPTS - 1, READ_ATTEMPTS])
def test_what_a_device_fails_to_read_is_tried_a_few_times_and_then_given_up(failures):
    class Weak(MemoryStorage):
        left = failures

        def get(self, key: str, limit_bytes: int) -> bytes:
            if self.left:
                self.left -= 1
                raise UnreadableError(f"read {key} failed")
            return super().get(key, limit_bytes)

    waits: list[float] = []
    inner = Weak("m")
    inner.put("a/b", b"x")
    policy = RetryPolicy(sleep=waits.append, uniform=lambda low, high: high)
    storage = RetryingStorage(inner, policy)
    if failures < READ_ATTEMPTS:
        assert storage.get("a/b", 10) == b"x"
    else:
        with pytest.raises(UnreadableError, match="a/b"):
            storage.get("a/b", 10)
    assert len(waits) == min(failures, READ_ATTEMPTS - 1) and sum(waits) < 3
