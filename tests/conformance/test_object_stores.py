"""What the object-store servers themselves do, without which the suites would prove little."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from spotspeed.storage import open_storage
from spotspeed.storage.fsspec_failures import is_precondition_failure
from tests.object_stores import KINDS, ObjectStore

Servers = Callable[[str], ObjectStore]


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_itself_refuses_a_put_on_condition(servers: Servers, kind: str) -> None:
    url = f"{servers(kind).url}/{uuid.uuid4().hex}/claimed"
    filesystem, path = fsspec.core.url_to_fs(url)
    barrier = threading.Barrier(6)

    def claim(index: int) -> bool:
        barrier.wait()
        try:
            filesystem.pipe_file(path, b"%d" % index, mode="create")
        except Exception as error:
            assert is_precondition_failure(error), repr(error)
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(claim, range(6)))
    assert sum(won) == 1
    assert filesystem.cat_file(path) == b"%d" % won.index(True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_atomic_create_is_found_to_be_one(servers: Servers, kind: str) -> None:
    storage = open_storage(f"{servers(kind).url}/{uuid.uuid4().hex}")
    assert storage.create("epochs/1", b"first")
    assert not storage.create("epochs/1", b"second")
    assert storage.has_atomic_create
    assert storage.get("epochs/1", 10) == b"first"
