"""Opens the store that a `path` of the configuration names."""

from __future__ import annotations

import os
import threading
from functools import reduce

from spotspeed.errors import ConfigError
from spotspeed.storage.contract import Storage
from spotspeed.storage.intercept import InterceptedStorage, Interceptor
from spotspeed.storage.local import LocalStorage
from spotspeed.storage.memory import MemoryStorage
from spotspeed.storage.redaction import refuse_credentials
from spotspeed.storage.retry import RetryingStorage, RetryPolicy

_memories: dict[str, MemoryStorage] = {}
_memories_lock = threading.Lock()


def open_storage(url: str | os.PathLike[str], *through: Interceptor) -> Storage:
    """The store at a directory or URL, with retries; nothing is created until the first write.

    A directory may be given as such or as file://; memory://NAME is one store per name and
    process; anything else is opened by fsspec. Each attempt of a call goes `through` a tracer, a
    bandwidth limit or both, the first of them outermost. Raises ConfigError when the URL cannot
    name a store, with what to write instead.
    """
    policy = RetryPolicy()
    plain = _open_plain(os.fspath(url), policy)
    return RetryingStorage(reduce(InterceptedStorage, reversed(through), plain), policy)


def _open_plain(url: str, policy: RetryPolicy) -> Storage:
    scheme, separator, rest = url.partition("://")
    if not url.strip() or "\0" in url or not _is_name(url) or (separator and not scheme):
        raise ConfigError(f"path {url!r} names nothing: give a directory or a URL like s3://bucket")
    if separator:
        refuse_credentials(url)
    else:
        return _open_directory(os.path.abspath(os.path.expanduser(url)))
    if scheme in ("file", "local"):
        if not rest.startswith("/"):
            raise ConfigError(f"path {url!r}: write file:///absolute/directory")
        return _open_directory(rest)
    if scheme == "memory":
        with _memories_lock:
            return _memories.setdefault(rest.strip("/"), MemoryStorage(rest.strip("/")))
    if not rest.strip("/"):
        raise ConfigError(f"path {url!r}: the bucket or host is missing after {scheme}://")
    # fsspec takes a while to import, and the saver of a local path does without.
    from spotspeed.storage.fsspec_backend import FsspecStorage

    return FsspecStorage(url, policy=policy)


def _is_name(url: str) -> bool:
    """Whether the system could have a file of that name: lone surrogates have no bytes."""
    try:
        os.fsencode(url)
    except UnicodeEncodeError:
        return False
    return True


def _open_directory(path: str) -> Storage:
    if os.path.lexists(path) and not os.path.isdir(path):
        what = "a file" if os.path.exists(path) else "a link to nothing"
        raise ConfigError(f"path {path!r} is {what}: give a directory, or a name that is free")
    return LocalStorage(path)
