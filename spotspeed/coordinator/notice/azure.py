"""Azure spot VMs: the scheduled events that concern this machine.

Wire format: "Azure Metadata Service: Scheduled Events for Linux VMs" of the Azure documentation.
Events are not acknowledged: that would only hasten them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from spotspeed.coordinator.notice.contract import Notice
from spotspeed.coordinator.notice.fetch import Address, Response, parse_date, parse_object, request
from spotspeed.coordinator.notice.watch import LookError, Sighting, Watch

_PERIOD_S = 1.0
_TIMEOUT_S = 5.0
_FIRST_TIMEOUT_S = 150.0
"""The first call turns the service on, which takes up to two minutes."""
_ENDPOINT = "http://169.254.169.254"
_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
_COMPUTE = "/metadata/instance/compute?api-version=2021-02-01"
_ENDING = frozenset({"Preempt", "Terminate", "Reboot", "Redeploy"})


def azure_source(environ: Mapping[str, str] = os.environ, *, period_s: float = _PERIOD_S) -> Watch:
    """Watches the scheduled events, at AZURE_POD_IDENTITY_AUTHORITY_HOST where that is set.

    Preempt, Terminate, Reboot and Redeploy of this VM are notices; Freeze is a short pause and is
    not. Raises ConfigError for an endpoint that is not an http URL.
    """
    url = environ.get("AZURE_POD_IDENTITY_AUTHORITY_HOST") or _ENDPOINT
    return Watch("azure", _AzureLook(Address.parse(url)), period_s=period_s)


class _AzureLook:
    def __init__(self, address: Address) -> None:
        self._address = address
        self._machine: str | None = None
        self._timeout_s = _FIRST_TIMEOUT_S

    def __call__(self, stop_fd: int) -> Iterator[Sighting]:
        if self._machine is None:
            self._machine = self._own_name(stop_fd)
        response = self._get(_EVENTS, self._timeout_s, stop_fd)
        self._timeout_s = _TIMEOUT_S
        events = parse_object(response, _EVENTS).get("Events")
        for event in events if isinstance(events, list) else ():
            if isinstance(event, dict) and self._concerns_us(event):
                left_s = _seconds_until(str(event.get("NotBefore", "")), response)
                yield Sighting(str(event.get("EventId")), Notice("azure", left_s, stop=True))

    def _concerns_us(self, event: Mapping[str, object]) -> bool:
        resources = event.get("Resources")
        is_ours = isinstance(resources, list) and self._machine in resources
        return is_ours and str(event.get("EventType")) in _ENDING

    def _own_name(self, stop_fd: int) -> str:
        name = parse_object(self._get(_COMPUTE, _TIMEOUT_S, stop_fd), _COMPUTE).get("name")
        if not isinstance(name, str) or not name:
            raise LookError(f"{_COMPUTE}: does not name this machine")
        return name

    def _get(self, path: str, timeout_s: float, stop_fd: int) -> Response:
        response = request(
            "GET", self._address, path, headers={"Metadata": "true"}, timeout_s=timeout_s,
            stop_fd=stop_fd,
        )  # fmt: skip
        if response.status != 200:
            raise LookError(f"{path}: status {response.status}")
        return response


def _seconds_until(moment: str, response: Response) -> float | None:
    """Seconds to an RFC 7231 date; 0 for an empty one, which says that the event has started."""
    if not moment:
        return 0.0
    moment_s = parse_date(moment)
    return None if moment_s is None else max(0.0, moment_s - response.date_s)
