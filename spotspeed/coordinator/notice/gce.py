"""GCE spot and preemptible VMs: the `preempted` value of the metadata server, by long poll.

Wire format: "Detect if a preemption process has started" and "Wait for change" of the Compute
Engine documentation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from urllib.parse import quote

from spotspeed.coordinator.notice.contract import Notice
from spotspeed.coordinator.notice.fetch import Address, request
from spotspeed.coordinator.notice.watch import LookError, Sighting, Watch

_PERIOD_S = 0.05
_POLL_S = 60
_TIMEOUT_S = _POLL_S + 10.0
SHUTDOWN_S = 30.0
"""What a VM has that has not asked for the notice of 120 s."""
_HOST = "metadata.google.internal"
_PATH = "/computeMetadata/v1/instance/preempted"


def gce_source(
    environ: Mapping[str, str] = os.environ, *, seconds_left: float | None = SHUTDOWN_S
) -> Watch:
    """Watches the metadata server, at GCE_METADATA_HOST where that is set.

    The value names no time, and is the same for a VM with 30 s and one that has asked for the
    notice of 120 s: `seconds_left` is what is told. Raises ConfigError for a host that is none.
    """
    host = environ.get("GCE_METADATA_HOST") or _HOST
    return Watch("gce", _GceLook(Address.parse(host), seconds_left), period_s=_PERIOD_S)


class _GceLook:
    def __init__(self, address: Address, seconds_left: float | None) -> None:
        self._address, self._seconds_left = address, seconds_left
        self._etag = "0"

    def __call__(self, stop_fd: int) -> Iterator[Sighting]:
        query = f"?wait_for_change=true&timeout_sec={_POLL_S}&last_etag={quote(self._etag)}"
        response = request(
            "GET", self._address, _PATH + query, headers={"Metadata-Flavor": "Google"},
            timeout_s=_TIMEOUT_S, stop_fd=stop_fd,
        )  # fmt: skip
        if response.status != 200:
            raise LookError(f"{_PATH}: status {response.status}")
        if response.headers.get("metadata-flavor") != "Google":
            raise LookError(f"{_PATH}: the answer is not from a Google metadata server")
        value = response.body.strip()
        if value not in (b"TRUE", b"FALSE"):
            raise LookError(f"{_PATH}: neither TRUE nor FALSE: {value[:80]!r}")
        etag = response.headers.get("etag", "")
        if not etag:
            raise LookError(f"{_PATH}: no ETag to wait with")
        self._etag = etag
        if value == b"TRUE":
            yield Sighting("preempted", Notice("gce", self._seconds_left, stop=True))
