"""Tells from a store's exception, without importing its package, whether to try again.

The packages behind fsspec raise OSError with an errno (s3fs), their own HttpError with `code`
(gcsfs), azure.core exceptions with `status_code` (adlfs), and aiohttp's or botocore's connection
errors; what follows looks at those attributes and names along the chain of causes.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator

from spotspeed.errors import SpotSpeedError, StorageError, TransientStorageError
from spotspeed.storage.failures import TRANSIENT_ERRNOS, storage_error
from spotspeed.storage.redaction import redact

_TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_PRECONDITION_CODES = frozenset({"PreconditionFailed", "412", "BlobAlreadyExists"})
_UNSUPPORTED_CODES = frozenset({"NotImplemented", "501"})
_TRANSIENT_NAMES = frozenset({
    "ClientConnectionError", "ClientConnectorError", "ClientOSError", "ClientPayloadError",
    "ConnectTimeoutError", "ConnectionClosedError", "EndpointConnectionError",
    "FSTimeoutError", "HTTPClientError", "IncompleteRead", "IncompleteReadError",
    "ReadTimeoutError", "ResponseStreamingError", "ServerDisconnectedError",
    "ServiceRequestError", "ServiceRequestTimeoutError", "ServiceResponseError",
})  # fmt: skip


def is_precondition_failure(error: BaseException) -> bool:
    """Whether a conditional put was refused because the object exists."""
    for link in _chain(error):
        if isinstance(link, FileExistsError) or _status(link) == 412:
            return True
        if _service_code(link) in _PRECONDITION_CODES:
            return True
    return False


def is_unsupported(error: BaseException) -> bool:
    """Whether the store says that it does not implement what the request asks for."""
    return any(
        _status(link) == 501
        or _service_code(link) in _UNSUPPORTED_CODES
        or (isinstance(link, OSError) and link.errno == errno.ENOSYS)
        for link in _chain(error)
    )


def is_range_failure(error: BaseException) -> bool:
    """Whether a read was refused because the object ends before the range begins."""
    return any(
        _status(link) == 416 or _service_code(link) in ("InvalidRange", "416")
        for link in _chain(error)
    )


def is_transient(error: BaseException) -> bool:
    """Whether a later attempt may succeed: overload, a lost connection, a timeout."""
    for link in _chain(error):
        if isinstance(link, (ConnectionError, TimeoutError, asyncio.TimeoutError)):
            return True
        if isinstance(link, OSError) and link.errno in TRANSIENT_ERRNOS | {errno.EREMOTEIO}:
            return True
        if _status(link) in _TRANSIENT_STATUS or type(link).__name__ in _TRANSIENT_NAMES:
            return True
    return False


def remote_error(operation: str, place: str, error: Exception) -> SpotSpeedError:
    """The error to raise for whatever a store raised while doing `operation` at `place`."""
    if isinstance(error, SpotSpeedError):
        return error
    if is_transient(error):
        return TransientStorageError(f"{operation} {place} failed for now: {_describe(error)}")
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return storage_error(operation, place, FileNotFoundError())
    if isinstance(error, PermissionError):
        return StorageError(
            f"{operation} {place} failed: {_describe(error)}; check the credentials of this "
            f"process and what they may do there"
        )
    return StorageError(f"{operation} {place} failed: {_describe(error)}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(8):
        if link is None:
            return
        yield link
        link = link.__cause__


def _status(error: BaseException) -> int | None:
    for name in ("status", "status_code", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int):
            return value
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        value = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return value if isinstance(value, int) else None
    return None


def _service_code(error: BaseException) -> str | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code"))
    return None


def _describe(error: BaseException) -> str:
    # Redacted whole: what is cut in the middle is not recognised.
    text = " ".join(redact(str(error)).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
