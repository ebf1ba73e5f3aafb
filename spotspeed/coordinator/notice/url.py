"""A URL that answers 404 until the machine is doomed, then 200 with a time.

Alibaba Cloud, Tencent Cloud and Huawei Cloud announce the end of a spot instance so.
"""

from __future__ import annotations

from collections.abc import Iterator

from spotspeed.coordinator.notice.contract import Notice
from spotspeed.coordinator.notice.fetch import Address, parse_moment, request
from spotspeed.coordinator.notice.watch import LookError, Sighting, Watch

_PERIOD_S = 2.0
_TIMEOUT_S = 2.0
KNOWN_URLS = {
    "alibaba": "http://100.100.100.200/latest/meta-data/instance/spot/termination-time",
    "tencent": "http://metadata.tencentyun.com/latest/meta-data/spot/termination-time",
}


def url_source(name: str, url: str, *, period_s: float = _PERIOD_S) -> Watch:
    """Watches `url`; a body that is an ISO 8601 time in UTC says how long is left.

    An empty body is a notice too; any other is not, as it may be a portal's page.
    Raises ConfigError for a URL that is not http.
    """
    return Watch(name, _UrlLook(name, Address.parse(url)), period_s=period_s)


class _UrlLook:
    def __init__(self, name: str, address: Address) -> None:
        self._name = name
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
        moment_s = parse_moment(moment)
        if moment and moment_s is None:
            raise LookError(f"neither empty nor a time: {moment[:80]!r}")
        left_s = None if moment_s is None else max(0.0, moment_s - response.date_s)
        yield Sighting(moment, Notice(self._name, left_s, stop=True))
