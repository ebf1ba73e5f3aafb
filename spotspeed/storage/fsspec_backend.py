"""Objects in any store that fsspec reaches: S3, Google Cloud Storage, Azure, and others.

The stores named in `_OBJECT_STORES` publish an object when its upload completes, and refuse a
conditional put atomically in the backend's own code; a writer sends parts to the final key there
(storage/multipart.py), or streams to it where the client is not one that is known. Elsewhere a
writer streams to a hidden name and moves it, as atomically as that store moves, and `create` is
exists-then-put (`has_atomic_create` is False): fsspec's generic `create` mode is no more than that.
"""

from __future__ import annotations

import contextlib
import datetime
import secrets
import time
from collections.abc import Iterator
from typing import Any

import fsspec

from spotspeed import events
from spotspeed.errors import ConfigError, FormatError, StorageError
from spotspeed.storage.contract import (
    Leftover,
    ObjectInfo,
    ReadBuffer,
    WriteBuffer,
    Writer,
    as_bytes_view,
    check_key,
    check_prefix,
)
from spotspeed.storage.fsspec_failures import (
    is_precondition_failure,
    is_range_failure,
    is_unsupported,
    remote_error,
)
from spotspeed.storage.fsspec_writer import FsspecWriter
from spotspeed.storage.multipart import MultipartWriter, Target
from spotspeed.storage.part_uploads import (
    HIDDEN,
    PART_BYTES,
    S3Upload,
    abort_s3_upload,
    s3_uploads,
    upload_kind,
)
from spotspeed.storage.redaction import harmless
from spotspeed.storage.retry import RetryPolicy
from spotspeed.storage.web_ranges import WebRanges

_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
_IMITATED = frozenset({"s3", "s3a"})
"""Protocols that many stores speak and not all speak well."""
_READ_ONLY = frozenset({"http", "https"})


class FsspecStorage:
    """A Storage below an fsspec URL; `filesystem` defaults to the one the URL names.

    `policy` is how the parts of an upload are repeated; other calls are not repeated here.
    """

    def __init__(
        self, url: str, *, filesystem: Any = None, policy: RetryPolicy | None = None
    ) -> None:
        self._policy = RetryPolicy() if policy is None else policy
        self._url = url.rstrip("/")
        self._protocol = url.split("://", 1)[0].split("::", 1)[0]
        self._fs = _filesystem(url) if filesystem is None else filesystem
        self._root = self._fs._strip_protocol(self._url).rstrip("/")
        self._is_object_store = self._protocol in _OBJECT_STORES
        self._upload = upload_kind(self._fs, self._protocol)
        self._is_conditional = self._is_object_store
        self._is_proven = self._protocol not in _IMITATED
        self._web = WebRanges(self._fs) if self._protocol in _READ_ONLY else None

    @property
    def url(self) -> str:
        return self._url

    @property
    def has_atomic_create(self) -> bool:
        return self._is_conditional

    def put(self, key: str, data: ReadBuffer) -> None:
        path, content = self._writable(key), bytes(as_bytes_view(data))
        if not self._is_object_store:
            with self.writer(key) as writer:
                writer.write(content)
                writer.commit()
            return
        with self._failing("put", key):
            self._fs.pipe_file(path, content)

    def create(self, key: str, data: ReadBuffer) -> bool:
        """See Storage.create; the first one finds out whether the store keeps its word.

        Some that speak the protocol of S3 ignore the condition and replace the object, others
        refuse every request that has one. So the first creation looks before, and is repeated
        after: a store that accepts it twice, or does not know what is asked, is from then on one
        without atomic create.
        """
        path, content = self._writable(key), bytes(as_bytes_view(data))
        if not self._is_conditional or not self._is_proven:
            with self._failing("create", key):
                self._fs.invalidate_cache()
                if self._fs.exists(path):
                    return False
        if not self._is_conditional:
            self.put(key, content)
            return True
        is_new = self._put_new(key, path, content)
        if is_new and not self._is_proven:
            if self._put_new(key, path, content):
                self._give_up_condition("it replaces an object that it was told not to replace")
            self._is_proven = True
        return is_new

    def writer(self, key: str) -> Writer:
        path = self._writable(key)
        begin = self._upload
        if begin is not None:
            return MultipartWriter(
                Target(
                    place=self._place(key),
                    failing=lambda operation: self._failing(operation, key),
                    begin=lambda: begin(self._fs, path),
                    put=lambda content: self.put(key, content),
                    size=lambda: self.size(key),
                ),
                self._policy,
            )
        target = path
        if not self._is_object_store:
            parent, _, _ = path.rpartition("/")
            target = f"{parent}/{HIDDEN}{secrets.token_hex(12)}"
            with self._failing("write", key):
                self._fs.makedirs(parent, exist_ok=True)
        with self._failing("write", key):
            file = self._fs.open(target, "wb", block_size=PART_BYTES)
        return FsspecWriter(self._fs, file, (target, path), self._place(key))

    def get(self, key: str, limit_bytes: int) -> bytes:
        content = self._range(key, 0, limit_bytes + 1)
        if len(content) > limit_bytes:
            raise FormatError(
                f"{self._place(key)}: more than the {limit_bytes} bytes that are read"
            )
        return content

    def read_into(self, key: str, offset: int, buffer: WriteBuffer) -> None:
        view = as_bytes_view(buffer)
        stop = offset + len(view)
        content = self._range(key, offset, stop)
        if len(content) != len(view):
            raise FormatError(
                f"{self._place(key)}: [{offset}, {stop}) were asked for and "
                f"{len(content)} bytes are there; the object is cut short"
            )
        view[:] = content

    def size(self, key: str) -> int:
        path = self._path(key)
        with self._failing("read", key):
            self._fs.invalidate_cache(path)
            if self._web is not None:
                self._web.forget(path)
            info = self._fs.info(path)
            if info["type"] != "file" or info["size"] is None:
                raise FileNotFoundError(path)
            return int(info["size"])

    def directories(self, prefix: str = "") -> list[str]:
        path = self._below(prefix)
        with self._failing("list", prefix):
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = (e["name"].rstrip("/").rpartition("/")[2] for e in entries
                 if e["type"] == "directory")  # fmt: skip
        return sorted({name for name in names if _is_key(name)})

    def delete(self, key: str) -> None:
        path = self._writable(key)
        with self._failing("delete", key), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def delete_prefix(self, prefix: str) -> None:
        path = self._writable(check_prefix(prefix))
        with self._failing("delete", prefix), contextlib.suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            if self._fs.isdir(path):
                self._fs.rm(path, recursive=True)
        if self._upload is S3Upload:
            self._end_uploads(prefix)

    def leftovers(self, prefix: str = "") -> list[Leftover]:
        path = self._below(prefix)
        if self._protocol in _READ_ONLY:
            return []
        with self._failing("list unfinished writes below", prefix):
            if self._upload is not S3Upload:
                return sorted(self._hidden(path))
            bucket, _, _ = self._fs.split_path(self._root)
            return sorted(
                Leftover(self._relative(f"{bucket}/{key}"), 0, began, upload)
                for key, upload, began in s3_uploads(self._fs, path)
                if _is_key(self._relative(f"{bucket}/{key}"))
            )

    def discard(self, leftover: Leftover) -> None:
        folder, _, name = leftover.path.rpartition("/")
        if not leftover.upload and not name.startswith(HIDDEN):
            raise StorageError(f"{self._place(leftover.path)}: is not what a write has left")
        path = f"{self._below(folder)}/{name}"
        with self._failing("delete", leftover.path), contextlib.suppress(FileNotFoundError):
            if leftover.upload:
                bucket, key, _ = self._fs.split_path(path)
                abort_s3_upload(self._fs, bucket, key, leftover.upload)
            else:
                self._fs.rm_file(path)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        path = self._below(prefix)
        with self._failing("list", prefix):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        below = f"{check_prefix(prefix)}/" if prefix else ""
        infos = ((self._relative(name), info) for name, info in found.items())
        return sorted(
            ObjectInfo(key, int(info["size"] or 0))
            for key, info in infos
            if info["type"] == "file" and key.startswith(below) and _is_key(key)
        )

    def _put_new(self, key: str, path: str, content: bytes) -> bool:
        try:
            self._fs.pipe_file(path, content, mode="create")
        except Exception as error:
            if is_precondition_failure(error):
                return False
            if self._is_proven or not is_unsupported(error):
                raise remote_error("create", self._place(key), error) from harmless(error)
        else:
            return True
        self._give_up_condition("it does not know the condition If-None-Match and refuses the put")
        self.put(key, content)
        return True

    def _give_up_condition(self, cause: str) -> None:
        self._is_conditional, self._is_proven = False, True
        events.emit(events.Lost(f"atomic create at {self._url}", cause))

    def _range(self, key: str, start: int, stop: int) -> bytes:
        """What the object has of [start, stop)."""
        path = self._path(key)
        if stop <= start:
            return b""
        with self._failing("read", key):
            try:
                if self._web is not None:
                    return self._web.read(path, start, stop)
                return bytes(self._fs.cat_file(path, start=start, end=stop))
            except Exception as error:
                if is_range_failure(error):
                    return b""
                raise

    def _end_uploads(self, prefix: str) -> None:
        """Give up what dead writers have begun below `prefix`."""
        try:
            for leftover in self.leftovers(prefix):
                self.discard(leftover)
        except StorageError as error:
            # Everything that has a name is gone, and that is what the caller needs.
            events.emit(events.Lost(f"unfinished uploads below {self._place(prefix)}", str(error)))

    def _hidden(self, path: str) -> Iterator[Leftover]:
        """Files below `path` that have hidden names: parts, and what was to be moved."""
        self._fs.invalidate_cache()
        found: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = self._fs.find(path, detail=True)
        for name, info in found.items():
            if name.rpartition("/")[2].startswith(HIDDEN):
                yield Leftover(self._relative(name), int(info["size"] or 0), _modified(info))

    def _relative(self, path: str) -> str:
        return path[len(self._root) + 1 :] if self._root else path

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _writable(self, key: str) -> str:
        if self._protocol in _READ_ONLY:
            raise StorageError(
                f"write {self._place(key)} failed: {self._protocol} URLs can only be read; "
                f"save to a directory or to a bucket's own URL"
            )
        return self._path(key)

    def _below(self, prefix: str) -> str:
        prefix = check_prefix(prefix)
        return f"{self._root}/{prefix}" if prefix else self._root

    def _place(self, key: str) -> str:
        return f"{self._url}/{key}"

    @contextlib.contextmanager
    def _failing(self, operation: str, key: str) -> Iterator[None]:
        """Every failure of a backend inside becomes a StorageError that says where."""
        try:
            yield
        except Exception as error:
            raise remote_error(operation, self._place(key), error) from harmless(error)


def _modified(info: dict[str, Any]) -> float:
    """When a file was last written, from what the clients behind fsspec say; now if they do not.

    s3fs has "LastModified", gcsfs "mtime" or "updated", adlfs "last_modified", others "created".
    """
    for name in ("LastModified", "mtime", "last_modified", "updated", "created"):
        value = info.get(name)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return datetime.datetime.fromisoformat(value).timestamp()
    return time.time()


def _is_key(name: str) -> bool:
    try:
        check_key(name)
    except StorageError:
        return False
    return True


def _filesystem(url: str) -> Any:
    try:
        filesystem, _ = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise ConfigError(f"{url}: {error}; install the package that reaches this store") from error
    except ValueError as error:
        is_known = url.partition("://")[0] in fsspec.available_protocols()
        what = "cannot be opened" if is_known else "no store of that kind is known"
        raise ConfigError(f"{url}: {what}: {error}") from error
    return filesystem
