"""How a stream becomes parts: how many at a time, what is repeated, what is left when it fails."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest

from spotspeed import events
from spotspeed.errors import ObjectNotFoundError, StorageError, TransientStorageError
from spotspeed.storage import multipart
from spotspeed.storage.multipart import PARALLEL, MultipartWriter, Target
from spotspeed.storage.retry import RetryPolicy

PART = 1000
EAGER = RetryPolicy(first_s=1e-6, longest_s=1e-6)


class Bucket:
    """One key of a store that takes parts, in memory; `on_send` may fail or wait."""

    def __init__(self, on_send: Callable[[int], None] = lambda number: None) -> None:
        self.on_send = on_send
        self.content: bytes | None = None
        self.parts: dict[int, bytes] = {}
        self.calls: list[str] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def send(self, number: int, content: bytearray) -> None:
        with self.lock:
            self.calls.append(f"send {number}")
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self.on_send(number)
            self.parts[number] = bytes(content)
        finally:
            with self.lock:
                self.at_once -= 1

    def complete(self, count: int) -> None:
        self.calls.append("complete")
        self.content = b"".join(self.parts[number] for number in range(count))

    def abort(self) -> None:
        self.calls.append("abort")
        assert self.at_once == 0, "a part on its way would come after the end"
        self.parts.clear()

    def put(self, content: bytearray) -> None:
        self.calls.append("put")
        self.content = bytes(content)

    def begin(self) -> Bucket:
        self.calls.append("begin")
        return self

    def size(self) -> int:
        return len(self.content or b"")

    @contextlib.contextmanager
    def failing(self, operation: str) -> Iterator[None]:
        yield

    def writer(self, policy: RetryPolicy = EAGER) -> MultipartWriter:
        target = Target("s3://b/k", self.failing, self.begin, self.put, self.size, PART)
        return MultipartWriter(target, policy)


@pytest.fixture
def heard() -> Iterator[list[events.Event]]:
    records: list[events.Event] = []
    events.add_sink(records.append)
    yield records
    events.remove_sink(records.append)


@pytest.mark.parametrize("size", [0, 1, PART - 1])
def test_what_fits_one_part_is_one_request(size: int) -> None:
    bucket = Bucket()
    with bucket.writer() as writer:
        writer.write(b"x" * size)
        writer.commit()
    assert bucket.calls == ["put"] and bucket.content == b"x" * size


@pytest.mark.parametrize("size", [PART, PART + 1, 3 * PART, 7 * PART + 17])
@pytest.mark.parametrize("piece", [1, 333, PART, 5 * PART])
def test_parts_are_cut_at_equal_sizes_whatever_is_written_at_a_time(size: int, piece: int) -> None:
    bucket, content = Bucket(), bytes(index % 251 for index in range(size))
    with bucket.writer() as writer:
        for start in range(0, size, piece):
            writer.write(memoryview(content)[start : start + piece])
        assert writer.position == size
        assert bucket.content is None
        writer.commit()
    assert bucket.content == content
    sizes = [size for _, size in sorted((n, len(p)) for n, p in bucket.parts.items())]
    assert sizes[:-1] == [PART] * (len(sizes) - 1) or not sizes


def test_parts_go_side_by_side_and_no_more_than_so_many_wait_in_memory() -> None:
    gate, arrived = threading.Event(), threading.Semaphore(0)
    written: list[int] = []

    def on_send(number: int) -> None:
        arrived.release()
        gate.wait()

    bucket = Bucket(on_send)

    def write() -> None:
        with bucket.writer() as writer:
            for _ in range(3 * PARALLEL):
                writer.write(bytes(PART))
                written.append(writer.position)
            writer.commit()

    thread = threading.Thread(target=write)
    thread.start()
    for _ in range(PARALLEL):
        arrived.acquire()
    # One more part than those on their way is filled, and then the writer waits.
    assert len(written) <= PARALLEL
    gate.set()
    thread.join()
    assert bucket.most_at_once == PARALLEL
    assert bucket.content == bytes(3 * PARALLEL * PART)


def test_a_part_that_fails_for_now_is_repeated_and_no_other_is() -> None:
    left = {3: 2}

    def on_send(number: int) -> None:
        if left.get(number, 0):
            left[number] -= 1
            raise TransientStorageError("slow down")

    bucket = Bucket(on_send)
    with bucket.writer() as writer:
        writer.write(b"y" * 6 * PART)
        writer.commit()
    assert bucket.content == b"y" * 6 * PART
    assert {name: bucket.calls.count(name) for name in bucket.calls} == {
        "begin": 1, "send 0": 1, "send 1": 1, "send 2": 1, "send 3": 3, "send 4": 1, "send 5": 1,
        "complete": 1, "abort": 1,
    }  # fmt: skip


def test_a_part_that_keeps_failing_ends_the_upload_with_its_error_and_no_part_is_left() -> None:
    def on_send(number: int) -> None:
        if number == 2:
            raise StorageError("write part 2 of s3://b/k failed: no such bucket")

    bucket = Bucket(on_send)
    with pytest.raises(StorageError, match="no such bucket"), bucket.writer() as writer:
        while True:
            writer.write(bytes(PART))
    assert bucket.content is None and not bucket.parts
    assert bucket.calls[-1] == "abort" and "complete" not in bucket.calls
    with pytest.raises(ValueError, match="closed"):
        writer.commit()


def test_a_failure_of_the_last_part_is_told_by_commit() -> None:
    def on_send(number: int) -> None:
        if number == 1:
            raise StorageError("access denied")

    bucket = Bucket(on_send)
    with bucket.writer() as writer:
        writer.write(bytes(PART + 1))
        with pytest.raises(StorageError, match="access denied"):
            writer.commit()
    assert bucket.content is None and bucket.calls.count("abort") == 1


def test_giving_up_does_not_wait_for_the_next_attempt() -> None:
    failed = threading.Event()

    def on_send(number: int) -> None:
        failed.set()
        raise TransientStorageError("slow down")

    patient = RetryPolicy(first_s=1e6, longest_s=1e6, budget_s=1e9)
    bucket = Bucket(on_send)
    with bucket.writer(patient) as writer:
        writer.write(bytes(PART))
        failed.wait()
    assert bucket.calls == ["begin", "send 0", "abort"]


def test_an_upload_that_was_completed_by_an_unanswered_attempt_is_whole() -> None:
    class Unanswered(Bucket):
        def complete(self, count: int) -> None:
            if self.content is not None:
                raise ObjectNotFoundError("there is no such upload")
            super().complete(count)
            raise TransientStorageError("connection lost")

    bucket = Unanswered()
    with bucket.writer() as writer:
        writer.write(bytes(2 * PART))
        writer.commit()
    assert bucket.content == bytes(2 * PART)


def test_an_upload_that_was_never_completed_is_not_taken_for_one_that_was() -> None:
    class Gone(Bucket):
        attempts = 0

        def complete(self, count: int) -> None:
            self.attempts += 1
            error = TransientStorageError if self.attempts == 1 else ObjectNotFoundError
            raise error("no")

    bucket = Gone()
    with bucket.writer() as writer:
        writer.write(bytes(2 * PART))
        with pytest.raises(ObjectNotFoundError):
            writer.commit()
    assert bucket.content is None


def test_parts_that_cannot_be_removed_are_told(heard: list[events.Event]) -> None:
    class Stubborn(Bucket):
        def abort(self) -> None:
            raise StorageError("access denied")

    with Stubborn().writer() as writer:
        writer.write(bytes(PART))
    (lost,) = [event for event in heard if isinstance(event, events.Lost)]
    assert "s3://b/k" in lost.what and "access denied" in lost.cause


def test_more_parts_than_a_store_takes_are_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(multipart, "MAX_PARTS", 3)
    with pytest.raises(StorageError, match="takes 3 parts of 1000"), Bucket().writer() as writer:
        writer.write(bytes(10 * PART))
