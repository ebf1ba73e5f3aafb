"""Metadata services of EC2, GCE and Azure on loopback, serving notices in their real wire formats.

For tests and rehearsals: point a job at one by the variables of `environ`, then `announce`.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.server
import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import parse_qs, urlsplit

Cloud = Literal["ec2", "gce", "azure", "url"]

_VARIABLES = {
    "ec2": "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    "gce": "GCE_METADATA_HOST",
    "azure": "AZURE_POD_IDENTITY_AUTHORITY_HOST",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the service says to one request."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class MetadataService:
    """One emulated service; `with` starts and stops it.

    `machine` is the VM name that Azure's events are filtered by. `misbehave` with an Answer, given
    to every request until it is None again, is for tests of what a client survives.
    """

    def __init__(
        self, cloud: Cloud, *, host: str = "127.0.0.1", port: int = 0, machine: str = "trainer-0"
    ) -> None:
        self.cloud = cloud
        self.machine = machine
        self.requests: list[str] = []
        self.misbehave: Answer | None = None
        self._changed = threading.Condition()
        self._doom_s: float | None = None
        self._is_hinted = False
        self._events: list[dict[str, object]] = []
        self._tokens: set[str] = set()
        self._etag = 1
        self._is_stopping = False
        self._replies = {
            "ec2": self._ec2, "gce": self._gce, "azure": self._azure, "url": self._url
        }  # fmt: skip
        self._server = _Server((host, port), _handler(self.answer))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )

    @property
    def address(self) -> str:
        """host:port."""
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    @property
    def environ(self) -> dict[str, str]:
        """The variables that lead clients here."""
        if self.cloud == "url":
            return {}
        prefix = "" if self.cloud == "gce" else "http://"
        return {_VARIABLES[self.cloud]: prefix + self.address}

    def __enter__(self) -> MetadataService:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stop to answer; long polls end."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def announce(self, seconds_left: float) -> None:
        """Doom the machine: every client sees the notice from now on."""
        with self._changed:
            self._doom_s = time.time() + seconds_left
            self._etag += 1
            self._events.append(self._azure_event("Preempt", [self.machine], self._doom_s))
            self._changed.notify_all()

    def hint(self) -> None:
        """Recommend a rebalance (EC2)."""
        with self._changed:
            self._is_hinted = True

    def schedule(self, event_type: str, machines: list[str], seconds_left: float | None) -> None:
        """Put a scheduled event for any machines (Azure); None: it has started."""
        with self._changed:
            doom_s = None if seconds_left is None else time.time() + seconds_left
            self._events.append(self._azure_event(event_type, machines, doom_s))

    def forget_tokens(self) -> None:
        """Let all session tokens expire (EC2)."""
        with self._changed:
            self._tokens.clear()

    def _ec2(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        if path == "/latest/api/token":
            ttl = headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
            if method != "PUT" or not ttl.isdigit() or not 1 <= int(ttl) <= 21600:
                return Answer(405 if method != "PUT" else 400)
            token = secrets.token_urlsafe(40)
            self._tokens.add(token)
            return Answer(200, token.encode(), {"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": ttl})
        if headers.get("x-aws-ec2-metadata-token") not in self._tokens:
            return Answer(401, b"Unauthorized")
        if path == "/latest/meta-data/spot/instance-action" and self._doom_s is not None:
            action = {"action": "terminate", "time": _iso(self._doom_s)}
            return _json(action)
        if path == "/latest/meta-data/events/recommendations/rebalance" and self._is_hinted:
            return _json({"noticeTime": _iso(0.0)})
        return Answer(404, b"<?xml version='1.0'?><html>404 - Not Found</html>")

    def _gce(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        parts = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if headers.get("metadata-flavor") != "Google":
            return Answer(403)
        if method != "GET" or parts.path != "/computeMetadata/v1/instance/preempted":
            return Answer(404)
        if query.get("wait_for_change") == "true":
            until_s = float(query.get("timeout_sec", "3600"))
            known = query.get("last_etag", str(self._etag))
            self._changed.wait_for(lambda: self._is_stopping or str(self._etag) != known, until_s)
        body = b"FALSE" if self._doom_s is None else b"TRUE"
        google = {"Metadata-Flavor": "Google", "ETag": str(self._etag)}
        return Answer(200, body, {**google, "Content-Type": "application/text"})

    def _azure(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        parts = urlsplit(path)
        if headers.get("metadata") != "true" or "api-version=" not in parts.query:
            return Answer(400, b'{"error": "Bad request: missing header or api-version"}')
        if method == "GET" and parts.path == "/metadata/scheduledevents":
            return _json({"DocumentIncarnation": len(self._events), "Events": self._events})
        if method == "GET" and parts.path == "/metadata/instance/compute":
            return _json({"name": self.machine, "vmId": "00000000-0000-0000-0000-000000000000"})
        return Answer(404)

    def _azure_event(
        self, event_type: str, machines: list[str], doom_s: float | None
    ) -> dict[str, object]:
        return {
            "EventId": secrets.token_hex(16), "EventType": event_type,
            "ResourceType": "VirtualMachine", "Resources": machines,
            "EventStatus": "Started" if doom_s is None else "Scheduled",
            "NotBefore": "" if doom_s is None else email.utils.formatdate(doom_s, usegmt=True),
            "Description": "", "EventSource": "Platform", "DurationInSeconds": -1,
        }  # fmt: skip

    def _url(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        if self._doom_s is None:
            return Answer(404)
        return Answer(200, _iso(self._doom_s).encode())

    def answer(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        """What is said to one request; called by the server's threads."""
        with self._changed:
            self.requests.append(f"{method} {path}")
            return self.misbehave or self._replies[self.cloud](method, path, headers)


Reply = Callable[[str, str, Mapping[str, str]], Answer]


def _handler(reply: Reply) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = reply(self.command, self.path, headers)
            with contextlib.suppress(ConnectionError):
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)

        do_PUT = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Requests are kept in `requests`; nothing is printed."""

    return Handler


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


def _iso(moment_s: float) -> str:
    return datetime.fromtimestamp(moment_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _json(value: object) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})
