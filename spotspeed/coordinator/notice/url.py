"""A URL that answers 404 until the machine is doomed, then 200 with a time.

Alibaba Cloud, Tencent Cloud and Huawei Cloud announce the end of a spot instance so: with a time in
ISO 8601, the second in UTC+8 without saying so, or with a JSON object that may hold one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, timedelta, timezone

from spotspeed.coordinator.notice.contract import Notice
from spotspeed.coordinator.notice.fetch import Address, parse_moment, request
from spotspeed.coordinator.notice.watch import LookError, Sighting, Watch

_PERIOD_S = 2.0
_TIMEOUT_S = 2.0
KNOWN_URLS = {
    "alibaba": "http://100.100.100.200/latest/meta-data/instance/spot/termination-time",
    "tencent": "http://metadata.tencentyun.com/latest/meta-data/spot/termination-time",
    "huawei": "http://169.254.169.254/openstack/latest/spot/instance-action",
}
_ZONES = {"tencent": timezone(timedelta(hours=8))}


def url_source(name: str, url: str, *, period_s: float = _PERIOD_S) -> Watch:
    """Watches `url`; a body that is an ISO 8601 time says how long is left: UTC, if it names none.

    So does the first time in a JSON object. An empty body is a notice too, and an object with an
    "action"; anything else is none, as it may be a portal's page.
    Raises ConfigError for a URL that is not http.
    """
    return Watch(name, _UrlLook(name, Address.parse(url)), period_s=period_s)


class _UrlLook:
    def __init__(self, name: str, address: Address) -> None:
        self._name, self._zone = name, _ZONES.get(name, UTC)
        self._address = address

    def __call__(self, stop_fd: int) -> Iterator[Sighting]:
        response = request(
            "GET", self._address, "", headers={}, timeout_s=_TIMEOUT_S, stop_fd=stop_fd
        )
        if response.status == 404:
            return
        if response.status != 200:
            raise LookError(f"status {response.status}")
        moment = response.body.decode("latin-1").strip().strip('"')
        said = _said(moment)
        times = [parse_moment(text, self._zone) for text in said.values()]
        moment_s = next((each for each in times if each is not None), None)
        if moment and moment_s is None and not said.get("action"):
            raise LookError(f"neither empty nor a time nor an action: {moment[:80]!r}")
        left_s = None if moment_s is None else max(0.0, moment_s - response.date_s)
        yield Sighting(moment, Notice(self._name, left_s, stop=True))


def _said(body: str) -> dict[str, str]:
    """The texts of the object that `body` is, or `body` itself as the time."""
    if not body.startswith("{"):
        return {"time": body}
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise LookError(f"no JSON: {body[:80]!r}") from error
    return {name: text for name, text in found.items() if isinstance(text, str)}
