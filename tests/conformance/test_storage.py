"""What every store must do, whatever is behind it (spotspeed/storage/contract.py)."""

from __future__ import annotations

import gc
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from spotspeed.errors import FormatError, ObjectNotFoundError, StorageError
from spotspeed.storage import ObjectInfo, Storage, open_storage
from spotspeed.storage.fsspec_backend import FsspecStorage
from spotspeed.storage.intercept import InterceptedStorage
from spotspeed.storage.local import LocalStorage
from spotspeed.storage.memory import MemoryStorage
from spotspeed.storage.retry import RetryingStorage
from spotspeed.storage.throttle import Throttle
from spotspeed.storage.trace import Tally, Tracer
from tests.object_stores import KINDS, ObjectStore

LIMIT = 1 << 20
Servers = Callable[[str], ObjectStore]


def _fsspec_local(path: Path) -> Storage:
    filesystem = fsspec.filesystem("file", auto_mkdir=True)
    return FsspecStorage(f"file://{path}/deep/root", filesystem=filesystem)


MAKERS: dict[str, Callable[[Path], Storage]] = {
    "local": lambda path: LocalStorage(path / "deep" / "root"),
    "memory": lambda path: MemoryStorage("conformance"),
    "memory-url": lambda path: open_storage(f"memory://{uuid.uuid4().hex}"),
    "retrying-local": lambda path: RetryingStorage(LocalStorage(path)),
    "directory": lambda path: open_storage(path / "new"),
    "traced-limited-directory": lambda path: open_storage(
        path / "new", Tracer(Tally().add), Throttle(1e12)
    ),
    "limited-memory": lambda path: InterceptedStorage(MemoryStorage("limited"), Throttle(1e12)),
    "traced-local": lambda path: InterceptedStorage(LocalStorage(path), Tracer(Tally().add)),
    "fsspec-local": _fsspec_local,
    "fsspec-memory": lambda path: FsspecStorage(f"memory://{uuid.uuid4().hex}/root"),
}
for _url in os.environ.get("SPOTSPEED_TEST_STORES", "").split():
    # Whoever has a real bucket tests it too: SPOTSPEED_TEST_STORES="s3://bucket gs://bucket".
    MAKERS[_url] = lambda path, url=_url: open_storage(f"{url}/{uuid.uuid4().hex}")  # type: ignore[misc]


@pytest.fixture(params=[*sorted(MAKERS), *KINDS])
def storage(request: pytest.FixtureRequest, tmp_path: Path, servers: Servers) -> Storage:
    if request.param in MAKERS:
        return MAKERS[request.param](tmp_path)
    return open_storage(f"{servers(request.param).url}/{uuid.uuid4().hex}/run")


def test_a_new_store_holds_nothing(storage: Storage) -> None:
    assert storage.list() == []
    assert storage.list("some/where") == []
    assert storage.directories() == []


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 5000])
def test_what_is_put_is_what_is_got(storage: Storage, content: bytes) -> None:
    storage.put("a/b.bin", content)
    assert storage.get("a/b.bin", len(content)) == content
    assert storage.size("a/b.bin") == len(content)
    assert storage.list() == [ObjectInfo("a/b.bin", len(content))]


def test_put_replaces_and_the_old_bytes_are_gone(storage: Storage) -> None:
    storage.put("latest", b"a longer first value")
    storage.put("latest", b"second")
    assert storage.get("latest", LIMIT) == b"second"
    assert storage.size("latest") == 6


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_every_kind_of_buffer_is_written_and_none_is_retained(
    storage: Storage, wrap: Callable[[bytes], bytes]
) -> None:
    storage.put("put", wrap(b"payload"))
    assert storage.create("create", wrap(b"payload"))
    buffer = bytearray(b"payload")
    with storage.writer("written") as writer:
        writer.write(buffer)
        buffer[:] = b"changed"
        writer.write(memoryview(buffer)[:3])
        writer.commit()
    assert storage.get("put", LIMIT) == storage.get("create", LIMIT) == b"payload"
    assert storage.get("written", LIMIT) == b"payloadcha"


def test_items_wider_than_a_byte_are_written_as_bytes(storage: Storage) -> None:
    wide = memoryview(bytes(range(16))).cast("I")
    storage.put("wide", wide)
    target = bytearray(16)
    storage.read_into("wide", 0, memoryview(target).cast("d"))
    assert target == bytes(range(16))


def test_create_gives_the_key_to_the_first_and_leaves_it_alone(storage: Storage) -> None:
    assert storage.create("epochs/000001.json", b"first")
    assert not storage.create("epochs/000001.json", b"second")
    assert not storage.create("epochs/000001.json", b"first")
    assert storage.get("epochs/000001.json", LIMIT) == b"first"


def test_create_of_an_empty_object_is_conditional_too(storage: Storage) -> None:
    assert storage.create("empty", b"")
    assert not storage.create("empty", b"")


def test_of_many_creators_exactly_one_wins(storage: Storage) -> None:
    if not storage.has_atomic_create:
        pytest.skip("this store only promises exists-then-put")
    barrier = threading.Barrier(8)

    def claim(index: int) -> bool:
        barrier.wait()
        return storage.create("contested", b"%d" % index)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(8)))
    assert sum(won) == 1
    assert storage.get("contested", LIMIT) == b"%d" % won.index(True)


def test_a_writer_publishes_only_by_commit(storage: Storage) -> None:
    with storage.writer("shard") as writer:
        writer.write(b"a" * 1000)
        writer.write(b"b" * 24)
        assert writer.position == 1024
        assert storage.list() == []
        with pytest.raises(ObjectNotFoundError):
            storage.size("shard")
        writer.commit()
    assert storage.get("shard", LIMIT) == b"a" * 1000 + b"b" * 24


def test_a_writer_left_without_commit_publishes_nothing(storage: Storage) -> None:
    storage.put("dir/shard", b"old")
    with pytest.raises(RuntimeError, match="the save failed"), storage.writer("dir/shard") as w:
        w.write(b"new bytes that must not appear")
        raise RuntimeError("the save failed")
    del w
    gc.collect()
    assert storage.get("dir/shard", LIMIT) == b"old"
    assert storage.list() == [ObjectInfo("dir/shard", 3)]


def test_an_aborted_writer_is_closed_for_good(storage: Storage) -> None:
    writer = storage.writer("shard")
    writer.write(b"x")
    writer.abort()
    writer.abort()
    with pytest.raises(ValueError, match="closed"):
        writer.write(b"y")
    with pytest.raises(ValueError, match="closed"):
        writer.commit()
    assert storage.list() == []


def test_abort_after_commit_is_harmless(storage: Storage) -> None:
    writer = storage.writer("shard")
    writer.write(b"x")
    writer.commit()
    writer.abort()
    assert storage.get("shard", LIMIT) == b"x"


def test_two_writers_of_one_key_do_not_mix(storage: Storage) -> None:
    one, other = storage.writer("k"), storage.writer("k")
    one.write(b"1111")
    other.write(b"22")
    other.commit()
    assert storage.get("k", LIMIT) == b"22"
    one.commit()
    assert storage.get("k", LIMIT) == b"1111"


def test_an_empty_writer_commits_an_empty_object(storage: Storage) -> None:
    with storage.writer("empty") as writer:
        writer.commit()
    assert storage.size("empty") == 0


def test_read_into_fills_exactly_the_range_asked_for(storage: Storage) -> None:
    content = bytes(range(256)) * 100
    storage.put("shard", content)
    for offset, size in [(0, 25600), (1, 1), (4095, 4098), (25599, 1), (300, 0)]:
        target = bytearray(b"\xee" * (size + 2))
        storage.read_into("shard", offset, memoryview(target)[1 : 1 + size])
        assert target == b"\xee" + content[offset : offset + size] + b"\xee"


def test_reading_past_the_end_is_corruption_that_names_the_object(storage: Storage) -> None:
    storage.put("shard", b"0123456789")
    for offset, size in [(0, 11), (9, 2), (10, 1), (500, 4)]:
        with pytest.raises(FormatError, match="shard"):
            storage.read_into("shard", offset, bytearray(size))


def test_an_object_above_the_limit_is_refused(storage: Storage) -> None:
    storage.put("manifest.json", b"0123456789")
    with pytest.raises(FormatError, match=r"manifest\.json"):
        storage.get("manifest.json", 9)
    assert storage.get("manifest.json", 10) == b"0123456789"


def test_what_is_not_there_is_not_found(storage: Storage) -> None:
    storage.put("there/it/is", b"x")
    for key in ("missing", "there", "there/it", "there/it/was", "there/it/is/not"):
        with pytest.raises(ObjectNotFoundError, match=key):
            storage.get(key, LIMIT)
        with pytest.raises(ObjectNotFoundError):
            storage.size(key)
        with pytest.raises(ObjectNotFoundError):
            storage.read_into(key, 0, bytearray(1))


def test_list_is_recursive_sorted_and_bounded_by_directory(storage: Storage) -> None:
    for key in ("b/2", "b/1", "b/c/3", "bb/4", "a", "b.x"):
        storage.put(key, key.encode())
    keys = [info.key for info in storage.list()]
    assert keys == sorted(["b/2", "b/1", "b/c/3", "bb/4", "a", "b.x"])
    assert [info.key for info in storage.list("b")] == ["b/1", "b/2", "b/c/3"]
    assert storage.list("b/") == storage.list("b")
    assert storage.list("b/c") == [ObjectInfo("b/c/3", 5)]
    assert storage.list("nothing") == []


def test_directories_names_one_level(storage: Storage) -> None:
    for key in ("step-1/m", "step-2/a/b", "epochs/1", "latest"):
        storage.put(key, b"x")
    assert storage.directories() == ["epochs", "step-1", "step-2"]
    assert storage.directories("step-2") == ["a"]
    assert storage.directories("step-1") == []
    assert storage.directories("latest") == storage.directories("missing") == []


def test_delete_removes_one_object_and_can_be_repeated(storage: Storage) -> None:
    storage.put("d/a", b"1")
    storage.put("d/b", b"2")
    storage.delete("d/a")
    storage.delete("d/a")
    storage.delete("elsewhere/x")
    assert [info.key for info in storage.list()] == ["d/b"]
    assert storage.create("d/a", b"again")


def test_delete_prefix_removes_a_directory_and_nothing_beside_it(storage: Storage) -> None:
    for key in ("step-1/a", "step-1/b/c", "step-10/a", "step-1.x"):
        storage.put(key, b"x")
    storage.delete_prefix("step-1")
    storage.delete_prefix("step-1/")
    assert [info.key for info in storage.list()] == ["step-1.x", "step-10/a"]
    storage.put("step-1/a", b"new")
    assert storage.get("step-1/a", LIMIT) == b"new"


def test_what_a_write_has_left_can_be_found_and_discarded(storage: Storage) -> None:
    storage.put("step/receipt", b"x")
    writers = [storage.writer(key) for key in ("step/shard", "other/shard")]
    for writer in writers:
        writer.write(b"y" * 1000)
    found = storage.leftovers()
    assert found == sorted(found)
    assert storage.leftovers("step") == [item for item in found if item.path.startswith("step/")]
    assert storage.leftovers("nothing") == []
    for item in found:
        assert abs(time.time() - item.modified_unix_s) < 3600
        storage.discard(item)
        storage.discard(item)
    assert storage.leftovers() == []
    assert storage.list() == [ObjectInfo("step/receipt", 1)]
    for writer in writers:
        writer.abort()


@pytest.mark.parametrize(
    "key",
    ["", "/abs", "a//b", "a/", "..", "a/../b", "a/./b", ".hidden", "a/.tmp-1", "sp ace", "a\0b",
     "a\nb", "x" * 201, "/".join(["d" * 100] * 11), "ü", "a\\b", "-option"],
)  # fmt: skip
def test_an_unsafe_key_is_refused_by_every_operation(storage: Storage, key: str) -> None:
    for call in (
        lambda: storage.put(key, b"x"),
        lambda: storage.create(key, b"x"),
        lambda: storage.writer(key),
        lambda: storage.get(key, 1),
        lambda: storage.read_into(key, 0, bytearray(1)),
        lambda: storage.size(key),
        lambda: storage.delete(key),
    ):
        with pytest.raises(StorageError, match="key"):
            call()
    if not key.endswith("/"):
        with pytest.raises(StorageError, match="key"):
            storage.delete_prefix(key)
    assert storage.list() == []


def test_many_threads_read_and_write_at_once(storage: Storage) -> None:
    def work(index: int) -> bool:
        content = bytes([index]) * (1000 + index)
        with storage.writer(f"dir-{index % 4}/{index}") as writer:
            for start in range(0, len(content), 100):
                writer.write(content[start : start + 100])
            writer.commit()
        target = bytearray(len(content))
        storage.read_into(f"dir-{index % 4}/{index}", 0, target)
        return target == content

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(48)))
    assert len(storage.list()) == 48
