"""The tracer tells every call as it was; the bandwidth limit holds all threads back together."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spotspeed.errors import ObjectNotFoundError, TransientStorageError
from spotspeed.storage import open_storage
from spotspeed.storage.intercept import Call, InterceptedStorage
from spotspeed.storage.memory import MemoryStorage
from spotspeed.storage.retry import RetryingStorage, RetryPolicy
from spotspeed.storage.throttle import Throttle
from spotspeed.storage.trace import Tally, Traced, Tracer


def test_every_call_is_told_with_its_bytes(tmp_path: Path) -> None:
    seen: list[Traced] = []
    storage = open_storage(tmp_path, Tracer(seen.append))
    storage.put("a/b", b"12345")
    storage.create("a/c", b"123")
    with storage.writer("a/d") as writer:
        writer.write(b"1" * 10)
        writer.commit()
    storage.read_into("a/d", 2, bytearray(4))
    storage.get("a/b", 100)
    storage.size("a/b")
    storage.list("a")
    storage.directories()
    storage.leftovers()
    storage.delete("a/b")
    storage.delete_prefix("a")
    assert [one.call for one in seen] == [
        Call("put", "a/b", 5), Call("create", "a/c", 3), Call("open", "a/d"),
        Call("write", "a/d", 10), Call("commit", "a/d"), Call("read", "a/d", wanted_bytes=4),
        Call("get", "a/b"), Call("size", "a/b"), Call("list", "a"), Call("list", ""),
        Call("list", ""), Call("delete", "a/b"), Call("delete", "a"),
    ]  # fmt: skip
    assert [one.received_bytes for one in seen if one.received_bytes] == [4, 5]
    assert all(one.elapsed_s >= 0 and one.error is None for one in seen)


def test_failures_are_told_and_raised_and_each_attempt_counts() -> None:
    class Flaky(MemoryStorage):
        left = 2

        def get(self, key: str, limit_bytes: int) -> bytes:
            if self.left:
                self.left -= 1
                raise TransientStorageError("not now")
            return super().get(key, limit_bytes)

    tally, seen = Tally(), list[Traced]()
    inner = Flaky("flaky")
    inner.put("k", b"123")
    both = InterceptedStorage(InterceptedStorage(inner, Tracer(seen.append)), Tracer(tally.add))
    storage = RetryingStorage(both, RetryPolicy(sleep=lambda seconds: None))
    assert storage.get("k", 10) == b"123"
    assert [type(one.error) for one in seen] == [TransientStorageError] * 2 + [type(None)]
    assert (tally.calls, tally.bytes_read) == ({"get": 3}, 3)
    with pytest.raises(ObjectNotFoundError):
        storage.size("missing")
    assert isinstance(seen[-1].error, ObjectNotFoundError)


def test_a_tally_of_many_threads_misses_nothing() -> None:
    tally = Tally()
    storage = InterceptedStorage(MemoryStorage("tally"), Tracer(tally.add))

    def work(number: int) -> None:
        storage.put(f"k{number}", bytes(100))
        storage.get(f"k{number}", 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(200)))
    assert (tally.bytes_written, tally.bytes_read) == (20_000, 20_000)
    assert tally.calls == {"put": 200, "get": 200}


class Clock:
    """Time that passes only by sleeping, for one thread after the other."""

    def __init__(self) -> None:
        self.now = 0.0
        self._lock = threading.Lock()

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds


def test_bytes_take_the_time_of_the_line() -> None:
    clock = Clock()
    throttle = Throttle(1000.0, clock.read, clock.sleep)
    storage = InterceptedStorage(MemoryStorage("line"), throttle)
    storage.put("a", bytes(500))
    assert clock.now == 0.0, "the line was free"
    storage.put("b", bytes(1500))
    assert clock.now == 0.5
    storage.read_into("b", 0, bytearray(1000))
    assert clock.now == 2.0
    storage.get("b", 2000)
    storage.list()
    assert clock.now == 2.0, "nobody knew how much would come"
    with storage.writer("c") as writer:
        writer.write(bytes(1))
        writer.commit()
    assert clock.now == 4.5, "so the next one has waited for it"
    clock.now = 100.0
    storage.put("d", bytes(10))
    assert clock.now == 100.0, "what was not used is not saved up"


def test_threads_share_one_line() -> None:
    waits: list[float] = []
    throttle = Throttle(1e6, lambda: 0.0, waits.append)
    storage = InterceptedStorage(MemoryStorage("shared"), throttle)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: storage.put(f"k{number}", bytes(1000)), range(8)))
    assert sorted(waits) == pytest.approx([number * 1e-3 for number in range(1, 8)])


def test_a_line_without_width_is_refused() -> None:
    with pytest.raises(ValueError, match="bandwidth"):
        Throttle(0)
