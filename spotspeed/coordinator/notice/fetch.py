"""A plain HTTP GET or PUT that cannot hang, follow, proxy or swallow more than it was told to.

Metadata services are on the link: no proxy, no redirect, no TLS. The time limit is for the whole
exchange, so that a server that sends a byte a second does not stretch it, and a stopped watch ends
it at once.
"""

from __future__ import annotations

import email.utils
import http.client
import io
import json
import select
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Any, cast
from urllib.parse import urlsplit

from spotspeed.coordinator.notice.watch import LookError, Stopped
from spotspeed.errors import ConfigError

BODY_BYTES_MAX = 1 << 20
_CONNECT_S_MAX = 3.0


@dataclass(frozen=True, slots=True)
class Response:
    """An answer of any status; `date_s` is the server's own clock, or ours if it names none."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    date_s: float


@dataclass(frozen=True, slots=True)
class Address:
    """Where a metadata service answers; `path` is put before every request's path."""

    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, url: str) -> Address:
        """Of "http://host[:port][/path]" or "host[:port]"; ConfigError for anything else."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port or 80
        except ValueError as error:
            raise ConfigError(f"{url!r} is not a usable URL: {error}") from error
        if not url.isascii() or not url.isprintable() or " " in url:
            raise ConfigError(f"{url!r} is not a usable URL: not printable ASCII without spaces")
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(f"{url!r}: a metadata service is reached by http://host[:port]")
        query = f"?{parts.query}" if parts.query else ""
        return cls(parts.hostname, port, parts.path.rstrip("/") + query)


def request(
    method: str,
    address: Address,
    path: str,
    *,
    headers: Mapping[str, str],
    timeout_s: float,
    stop_fd: int,
) -> Response:
    """One exchange; raises LookError without an answer, Stopped once `stop_fd` is readable."""
    deadline_s = time.monotonic() + timeout_s
    try:
        connect_s = min(timeout_s, _CONNECT_S_MAX)
        with socket.create_connection((address.host, address.port), connect_s) as sock:
            lines = [f"{method} {address.path}{path} HTTP/1.1", f"Host: {address.host}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            lines += ["Content-Length: 0", "Connection: close", "", ""]
            sock.sendall("\r\n".join(lines).encode("ascii"))
            return _read_response(sock, method, deadline_s, stop_fd)
    except (OSError, http.client.HTTPException) as error:
        target = f"http://{address.host}:{address.port}{address.path}{path}"
        raise LookError(f"{method} {target}: {type(error).__name__} {error}".rstrip()) from error


def _read_response(sock: socket.socket, method: str, deadline_s: float, stop_fd: int) -> Response:
    raw = _PatientReader(sock, deadline_s, stop_fd)
    response = http.client.HTTPResponse(cast(Any, raw), method=method)
    response.begin()
    body = response.read(BODY_BYTES_MAX + 1)
    if len(body) > BODY_BYTES_MAX:
        raise http.client.HTTPException(f"the answer has more than {BODY_BYTES_MAX} bytes")
    date_s = parse_date(response.headers.get("Date", ""))
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Response(response.status, headers, body, time.time() if date_s is None else date_s)


def parse_date(text: str) -> float | None:
    """Wall time of an RFC 7231 date; None for anything else."""
    try:
        parsed = email.utils.parsedate_tz(text)
        return None if parsed is None else float(email.utils.mktime_tz(parsed))
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def parse_moment(text: str, zone: tzinfo = UTC) -> float | None:
    """Wall time of an ISO 8601 date and time, which is of `zone` where it does not say; or None."""
    try:
        moment = datetime.fromisoformat(text.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=zone)).timestamp()
    except (ValueError, OverflowError):
        return None


def parse_object(response: Response, path: str) -> dict[str, object]:
    """The JSON object that `response` is; raises LookError for anything else."""
    try:
        found = json.loads(response.body.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise LookError(f"{path}: not JSON: {response.body[:80]!r}") from error
    if not isinstance(found, dict):
        raise LookError(f"{path}: not an object: {response.body[:80]!r}")
    return found


class _PatientReader(io.RawIOBase):
    """The receiving side of a socket, with one deadline for all reads together."""

    def __init__(self, sock: socket.socket, deadline_s: float, stop_fd: int) -> None:
        self._socket = sock
        self._deadline_s = deadline_s
        self._stop_fd = stop_fd

    def makefile(self, mode: str) -> io.BufferedReader:
        """What http.client asks of a socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(self._stop_fd, select.POLLIN)
        left_s = self._deadline_s - time.monotonic()
        ready = [fd for fd, _ in poller.poll(left_s * 1000)] if left_s > 0 else []
        if self._stop_fd in ready:
            raise Stopped
        if not ready:
            raise TimeoutError("no complete answer in time")
        return self._socket.recv_into(buffer)
