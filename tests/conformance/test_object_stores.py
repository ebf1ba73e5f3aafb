"""What is particular to real object-store servers: conditions, uploads in parts, overload."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import pytest

from spotspeed.errors import StorageError
from spotspeed.storage import Storage, open_storage
from spotspeed.storage.fsspec_backend import FsspecStorage
from spotspeed.storage.fsspec_failures import is_precondition_failure
from spotspeed.storage.part_uploads import PART_BYTES
from spotspeed.storage.retry import RetryPolicy
from tests.object_stores import BUCKET, KINDS, ObjectStore, RefusingProxy

Servers = Callable[[str], ObjectStore]
BLOCK = bytes(range(256)) * 4096 * 5
"""5 MiB, so that parts and pieces do not end together."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_itself_refuses_a_put_on_condition(servers: Servers, kind: str) -> None:
    url = f"{servers(kind).url}/{uuid.uuid4().hex}/claimed"
    filesystem, path = fsspec.core.url_to_fs(url)
    barrier = threading.Barrier(3)

    def claim(index: int) -> bool:
        barrier.wait()
        try:
            filesystem.pipe_file(path, b"%d" % index, mode="create")
        except Exception as error:
            assert is_precondition_failure(error), repr(error)
            return False
        return True

    with ThreadPoolExecutor(3) as pool:
        won = list(pool.map(claim, range(3)))
    assert sum(won) == 1
    assert filesystem.cat_file(path) == b"%d" % won.index(True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_atomic_create_is_found_to_be_one(servers: Servers, kind: str) -> None:
    storage = open_storage(f"{servers(kind).url}/{uuid.uuid4().hex}")
    assert storage.create("epochs/1", b"first")
    assert not storage.create("epochs/1", b"second")
    assert storage.has_atomic_create
    assert storage.get("epochs/1", 10) == b"first"


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, servers: Servers) -> Storage:
    return open_storage(f"{servers(request.param).url}/{uuid.uuid4().hex}")


def write(storage: Storage, key: str, blocks: int, *, commit: bool = True) -> None:
    with storage.writer(key) as writer:
        for _ in range(blocks):
            writer.write(BLOCK)
        if commit:
            writer.commit()


def unfinished(storage: Storage) -> list[str]:
    """What a store has of uploads below `storage` that nobody has completed."""
    filesystem, path = fsspec.core.url_to_fs(storage.url)
    if storage.url.startswith("s3"):
        found = filesystem.call_s3("list_multipart_uploads", Bucket=BUCKET)
        below = path.partition("/")[2]
        return [u["Key"] for u in found.get("Uploads", ()) if u["Key"].startswith(below)]
    filesystem.invalidate_cache()
    return [name for name in filesystem.find(path) if ".tmp-" in name]


def test_an_object_of_several_parts_arrives_whole_and_at_the_end(storage: Storage) -> None:
    with storage.writer("dir/shard") as writer:
        for _ in range(8):
            writer.write(BLOCK)
        assert storage.list() == []
        writer.commit()
    assert storage.size("dir/shard") == 8 * len(BLOCK) > 2 * PART_BYTES
    seam = bytearray(64)
    storage.read_into("dir/shard", PART_BYTES - 32, seam)
    assert seam == (BLOCK * 4)[PART_BYTES - 32 : PART_BYTES + 32]
    assert storage.get("dir/shard", 8 * len(BLOCK)) == BLOCK * 8
    assert unfinished(storage) == []


def test_an_upload_given_up_leaves_the_old_object_and_no_parts(storage: Storage) -> None:
    storage.put("dir/shard", b"old")
    write(storage, "dir/shard", 5, commit=False)
    assert storage.get("dir/shard", 10) == b"old"
    assert [info.key for info in storage.list()] == ["dir/shard"]
    assert unfinished(storage) == []


def test_what_a_killed_writer_began_goes_with_its_directory(servers: Servers) -> None:
    storage = open_storage(f"{servers('s3').url}/{uuid.uuid4().hex}")
    storage.put("step/receipt", b"x")
    storage.put("step-2/receipt", b"x")
    filesystem, path = fsspec.core.url_to_fs(storage.url)
    for name in ("step/shard", "step-2/shard"):
        key = f"{path.partition('/')[2]}/{name}"
        begun = filesystem.call_s3("create_multipart_upload", Bucket=BUCKET, Key=key)
        filesystem.call_s3("upload_part", Bucket=BUCKET, Key=key, UploadId=begun["UploadId"],
                           PartNumber=1, Body=b"x" * 100)  # fmt: skip
    assert [item.path for item in storage.leftovers()] == ["step-2/shard", "step/shard"]
    storage.delete_prefix("step")
    assert [key.rpartition("/")[0][-6:] for key in unfinished(storage)] == ["step-2"]
    assert [info.key for info in storage.list()] == ["step-2/receipt"]
    (left,) = storage.leftovers("step-2")
    assert abs(time.time() - left.modified_unix_s) < 3600
    storage.discard(left)
    storage.discard(left)
    assert unfinished(storage) == storage.leftovers() == []


def test_parts_of_a_writer_that_is_gone_are_found_and_discarded(storage: Storage) -> None:
    storage.put("step/receipt", b"x")
    writer = storage.writer("step/shard")
    for _ in range(8):
        writer.write(BLOCK)
    # Two parts are on their way: two objects of Google's, one upload of S3, and nothing that Azure
    # would tell.
    expected = {"gs": 2, "s3": 1, "az": 0}[storage.url.partition("://")[0]]
    deadline = time.monotonic() + 60
    while len(found := storage.leftovers("step")) < expected:
        assert time.monotonic() < deadline
    for item in found:
        assert item.path.startswith("step/")
        assert abs(time.time() - item.modified_unix_s) < 3600
        storage.discard(item)
    writer.abort()
    assert storage.leftovers() == []
    assert [info.key for info in storage.list()] == ["step/receipt"]


@pytest.fixture
def proxied(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[str, str], bool]], Storage]]:
    """Makes an S3 store behind a proxy whose own client repeats nothing."""
    store = servers("s3")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    proxies: list[RefusingProxy] = []

    def make(refuses: Callable[[str, str], bool]) -> Storage:
        proxy = RefusingProxy(store.environment["AWS_ENDPOINT_URL"], refuses)
        proxies.append(proxy)
        filesystem: Any = fsspec.filesystem(
            "s3", endpoint_url=proxy.url, skip_instance_cache=True, use_listings_cache=False
        )
        filesystem.retries = 1
        url = f"{store.url}/{uuid.uuid4().hex}"
        policy = RetryPolicy(first_s=0.001, longest_s=0.01, budget_s=0.03)
        return FsspecStorage(url, filesystem=filesystem, policy=policy)

    yield make
    for proxy in proxies:
        proxy.close()


def test_a_store_that_is_overloaded_now_and_then_loses_no_part(
    proxied: Callable[[Callable[[str, str], bool]], Storage],
) -> None:
    seen: dict[str, int] = {}
    lock = threading.Lock()

    def refuses(method: str, target: str) -> bool:
        if "uploadId" not in target and "uploads" not in target:
            return False
        with lock:
            seen[f"{method} {target}"] = count = seen.get(f"{method} {target}", 0) + 1
        return count <= 2

    storage = proxied(refuses)
    write(storage, "shard", 8)
    assert storage.get("shard", 8 * len(BLOCK)) == BLOCK * 8
    assert sorted(seen.values()) == [3] * 5, "begin, three parts, complete: each the third time"
    assert unfinished(storage) == []


def test_a_store_that_stays_overloaded_fails_the_upload_within_the_budget(
    proxied: Callable[[Callable[[str, str], bool]], Storage],
) -> None:
    storage = proxied(lambda method, target: "partNumber=2" in target)
    with pytest.raises(StorageError, match=r"write part 1 of s3://.*/shard failed for now"):
        write(storage, "shard", 8)
    assert storage.list() == []
    assert unfinished(storage) == []
