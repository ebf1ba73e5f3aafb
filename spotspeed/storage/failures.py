"""Turns the system's failures into errors that say what failed, what was missing, what to do."""

from __future__ import annotations

import errno
import os

from spotspeed.errors import (
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
    UnreadableError,
)

TRANSIENT_ERRNOS = frozenset({
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH,
    errno.EPIPE, errno.ESTALE, errno.ETIMEDOUT,
})  # fmt: skip
"""What a network or a network file system reports and may not report at the next attempt."""

UNREADABLE_ERRNOS = frozenset({
    errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.EREMOTEIO, errno.ELOOP,
})  # fmt: skip
"""What a disk or file system reports when it has the file and cannot give its bytes: a bad sector,
a checksum of the file system's own that does not match, damaged metadata. ELOOP is a symbolic link
where the file was, which somebody else has put there: one such must not hide all checkpoints."""

_ADVICE = {
    errno.ENOSPC: "no space is left on the device; free some, lower `keep`, or move `path`",
    errno.EDQUOT: "the disk quota is used up; free some, lower `keep`, or have it raised",
    errno.EFBIG: "the file is larger than the file system or the process limit (ulimit -f) allows",
    errno.EROFS: "the file system is mounted read-only; mount it writable or choose another path",
    errno.EIO: "the device reported an input/output error and may have lost data; "
    "check the disk (dmesg) and use another one",
    errno.ELOOP: "it is a symbolic link, and links below the root are not followed; "
    "put the files themselves there",
    errno.EISDIR: "it is a directory where a file is expected; move it out of the way",
    errno.ENOTDIR: "part of its path is a file or a symbolic link, not a directory; "
    "move that out of the way",
    errno.ENAMETOOLONG: "the path is too long for the file system; choose a shorter one",
    errno.EMFILE: "too many files are open in this process; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine; raise fs.file-max",
    errno.EMLINK: "the directory holds as many entries as the file system allows",
}


def storage_error(
    operation: str, place: str, error: OSError, *, done_bytes: int = 0, size_bytes: int = 0
) -> StorageError:
    """The error to raise for `error`, met while doing `operation` at `place`.

    With `size_bytes`, the text says that only `done_bytes` of them were handled. A missing file
    becomes ObjectNotFoundError, a failure that may pass TransientStorageError, a device that fails
    to read UnreadableError.
    """
    if isinstance(error, FileNotFoundError):
        return ObjectNotFoundError(f"{operation} {place}: there is no such object")
    progress = ""
    if size_bytes:
        progress = f" after {done_bytes} of {size_bytes} bytes, {size_bytes - done_bytes} missing"
    text = f"{operation} {place} failed{progress}: {_advice(error)}"
    if error.errno in TRANSIENT_ERRNOS:
        return TransientStorageError(text)
    if operation == "read" and error.errno in UNREADABLE_ERRNOS:
        return UnreadableError(text)
    return StorageError(text)


def _advice(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"permission denied to user id {os.geteuid()}; "
            f"give it read and write access or choose another path"
        )
    known = _ADVICE.get(error.errno) if error.errno is not None else None
    if known is not None:
        return known
    name = errno.errorcode.get(error.errno, "") if error.errno is not None else ""
    return f"{error.strerror or error} {name}".strip()
