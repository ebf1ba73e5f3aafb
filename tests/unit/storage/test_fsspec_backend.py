"""What is particular to object stores: failures that pass, imitations, uploads given up."""

from __future__ import annotations

import contextlib
import errno
import functools
import http.server
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from spotspeed import events
from spotspeed.errors import FormatError, ObjectNotFoundError, StorageError, TransientStorageError
from spotspeed.storage import open_storage
from spotspeed.storage.fsspec_backend import FsspecStorage
from spotspeed.storage.fsspec_failures import (
    is_precondition_failure,
    is_range_failure,
    remote_error,
)
from spotspeed.storage.part_uploads import PART_BYTES


class HttpError(Exception):
    """Like gcsfs's and azure's: the status is an attribute."""

    def __init__(self, **attributes: object) -> None:
        super().__init__("the server said no")
        self.__dict__.update(attributes)


def boto_error(status: int, code: str, translated: Exception) -> Exception:
    """Like s3fs's: a translated OSError whose cause holds botocore's response."""
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    translated.__cause__ = HttpError(response=response)
    return translated


class ServerDisconnectedError(Exception):
    """aiohttp's, by name."""


@pytest.mark.parametrize(
    "error",
    [HttpError(code=503), HttpError(status_code=429), HttpError(status=500), TimeoutError(),
     ConnectionResetError(), ServerDisconnectedError(),
     OSError(errno.EBUSY, "SlowDown"), OSError(errno.EREMOTEIO, "InternalError"),
     boto_error(503, "SlowDown", OSError(errno.EIO, "x")),
     boto_error(409, "ConditionalRequestConflict", OSError(errno.EIO, "x"))],
)  # fmt: skip
def test_overload_and_lost_connections_are_transient(error: Exception) -> None:
    raised = remote_error("put", "s3://b/k", error)
    assert isinstance(raised, TransientStorageError)
    assert "s3://b/k" in str(raised)


@pytest.mark.parametrize(
    "error",
    [HttpError(code=403), HttpError(status_code=400), ValueError("x"), PermissionError("denied"),
     boto_error(403, "AccessDenied", PermissionError("denied")), OSError(errno.EINVAL, "x")],
)  # fmt: skip
def test_refusals_are_final_and_say_where(error: Exception) -> None:
    raised = remote_error("put", "s3://b/k", error)
    assert type(raised) is StorageError
    assert "s3://b/k" in str(raised)


def test_a_missing_object_is_not_found() -> None:
    error = boto_error(404, "NoSuchKey", FileNotFoundError("x"))
    assert isinstance(remote_error("read", "s3://b/k", error), ObjectNotFoundError)


@pytest.mark.parametrize(
    "error",
    [FileExistsError("k"), HttpError(code=412), HttpError(status_code=412),
     boto_error(412, "PreconditionFailed", OSError(errno.EINVAL, "x"))],
)  # fmt: skip
def test_a_refused_condition_is_recognised(error: Exception) -> None:
    assert is_precondition_failure(error)
    assert not is_precondition_failure(OSError(errno.EINVAL, "something else"))


def test_a_range_beyond_the_end_is_recognised() -> None:
    assert is_range_failure(boto_error(416, "InvalidRange", OSError(errno.EINVAL, "x")))
    assert not is_range_failure(OSError(errno.EINVAL, "x"))


class Bucket(MemoryFileSystem):  # type: ignore[misc]
    """An object store in memory: uploads appear when they are closed."""

    honours_condition = True
    knows_condition = True

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        if mode == "create" and not self.knows_condition:
            raise boto_error(501, "NotImplemented", OSError(errno.EIO, "header not implemented"))
        if mode == "create" and self.honours_condition and self.exists(path):
            raise FileExistsError(path)
        self.store[self._strip_protocol(path)] = MemoryFile(self, path, value)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "wb":
            return super()._open(path, mode, **options)
        return Upload(self, path, mode, options["block_size"])


class Upload(AbstractBufferedFile):  # type: ignore[misc]
    """Collects parts; publishes at the end, as multipart uploads do."""

    parts: list[bytes]

    def _initiate_upload(self) -> None:
        self.parts = []

    def _upload_chunk(self, final: bool = False) -> bool:
        self.parts.append(self.buffer.getvalue())
        if final:
            self.fs.pipe_file(self.path, b"".join(self.parts))
        return True

    def discard(self) -> None:
        raise HttpError(code=404)


def bucket(*, honours_condition: bool = True, knows_condition: bool = True) -> FsspecStorage:
    filesystem = Bucket(global_store=False, skip_instance_cache=True)
    filesystem.honours_condition = honours_condition
    filesystem.knows_condition = knows_condition
    return FsspecStorage(f"s3://{uuid.uuid4().hex}/run", filesystem=filesystem)


@pytest.fixture
def heard() -> Iterator[list[events.Event]]:
    records: list[events.Event] = []
    events.add_sink(records.append)
    yield records
    events.remove_sink(records.append)


def test_an_upload_in_parts_appears_whole_and_at_the_end() -> None:
    storage, block = bucket(), b"0123456789abcdef" * (PART_BYTES // 32)
    with storage.writer("shard") as writer:
        for _ in range(5):
            writer.write(block)
        assert storage.list() == []
        writer.commit()
    assert storage.size("shard") == 5 * len(block)
    tail = bytearray(20)
    storage.read_into("shard", 4 * len(block) - 10, tail)
    assert tail == block[-10:] + block[:10]


def test_an_upload_given_up_never_appears_and_a_store_that_keeps_parts_is_told(
    heard: list[events.Event],
) -> None:
    storage = bucket()
    writer = storage.writer("shard")
    writer.write(bytes(PART_BYTES + 1))
    writer.abort()
    del writer
    assert storage.list() == []
    assert any(isinstance(event, events.Lost) and "shard" in event.what for event in heard)


def test_a_store_that_honours_the_condition_is_believed_after_a_proof() -> None:
    storage = bucket()
    assert storage.create("epochs/1", b"first")
    assert storage.has_atomic_create
    assert not storage.create("epochs/1", b"second")
    assert storage.create("epochs/2", b"third")
    assert storage.get("epochs/1", 10) == b"first"


def test_an_imitation_that_ignores_the_condition_is_found_out(heard: list[events.Event]) -> None:
    storage = bucket(honours_condition=False)
    assert storage.create("epochs/1", b"first")
    assert not storage.has_atomic_create
    assert not storage.create("epochs/1", b"second")
    assert storage.get("epochs/1", 10) == b"first"
    assert any(isinstance(event, events.Lost) for event in heard)


def test_an_imitation_does_not_replace_what_was_there_before_it_was_found_out() -> None:
    storage = bucket(honours_condition=False)
    storage.put("epochs/1", b"theirs")
    assert not storage.create("epochs/1", b"mine")
    assert storage.get("epochs/1", 10) == b"theirs"


def test_an_imitation_that_refuses_the_condition_is_asked_first_instead(
    heard: list[events.Event],
) -> None:
    storage = bucket(knows_condition=False)
    assert storage.create("epochs/1", b"first")
    assert not storage.has_atomic_create
    assert not storage.create("epochs/1", b"second")
    assert storage.create("epochs/2", b"third")
    assert storage.get("epochs/1", 10) == b"first"
    assert len([event for event in heard if "If-None-Match" in event.describe()]) == 1


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server over a directory."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with serving(handler) as url:
        yield url


@contextlib.contextmanager
def serving(handler: Any) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_web_server_is_read_and_never_written(web: str, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_bytes(b"{}")
    storage = open_storage(f"{web}/run")
    assert storage.get("manifest.json", 10) == b"{}"
    assert storage.size("manifest.json") == 2
    with pytest.raises(ObjectNotFoundError):
        storage.get("missing", 10)
    for call in (lambda: storage.put("x", b""), lambda: storage.create("x", b""),
                 lambda: storage.writer("x"), lambda: storage.delete("x")):  # fmt: skip
        with pytest.raises(StorageError, match="only be read"):
            call()


def test_a_web_server_that_ignores_ranges_is_read_right(
    web: str, tmp_path: Path, heard: list[events.Event]
) -> None:
    """As python's does: each answer is the whole file."""
    pytest.importorskip("aiohttp")
    content = bytes(range(256)) * 40
    (tmp_path / "shard").write_bytes(content)
    storage = open_storage(web)
    assert storage.size("shard") == len(content)
    for start, stop in ((0, 10), (4096, 4100), (10000, len(content))):
        part = bytearray(stop - start)
        storage.read_into("shard", start, part)
        assert part == content[start:stop]
    with pytest.raises(FormatError, match="more than the 100 bytes"):
        storage.get("shard", 100)
    with pytest.raises(FormatError, match="cut short"):
        storage.read_into("shard", len(content) - 5, bytearray(10))
    assert len([event for event in heard if "range requests" in event.describe()]) == 1
    (tmp_path / "shard").write_bytes(content[::-1])
    storage.size("shard")
    storage.read_into("shard", 4096, part := bytearray(4))
    assert part == content[::-1][4096:4100], "a reader that looks anew sees what is there now"


def test_a_large_file_of_a_web_server_without_ranges_is_refused_not_called_damaged(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr("spotspeed.storage.web_ranges.WHOLE_BYTES", 1000)
    (tmp_path / "shard").write_bytes(bytes(1001))
    with pytest.raises(StorageError, match="ignores range requests") as caught:
        open_storage(web).read_into("shard", 10, bytearray(10))
    assert type(caught.value) is StorageError


def test_a_web_server_with_ranges_sends_the_parts_alone(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40
    sent: list[int] = []

    class Ranged(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(200, content, with_body=False)

        def do_GET(self) -> None:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            part = content[int(first) : int(last) + 1]
            sent.append(len(part))
            self.answer(206, part, with_body=True)

        def answer(self, status: int, body: bytes, *, with_body: bool) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if with_body else b"")

        def log_message(self, *_: object) -> None:
            """Nothing."""

    pytest.importorskip("aiohttp")
    with serving(Ranged) as url:
        storage = open_storage(url)
        storage.read_into("shard", 4096, part := bytearray(4))
        assert part == content[4096:4100]
        storage.read_into("shard", 5000, part)
        assert part == content[5000:5004]
    assert sent == [1, 4, 4]
