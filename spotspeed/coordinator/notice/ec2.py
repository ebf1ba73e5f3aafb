"""EC2 spot: interruption notices and rebalance recommendations of the instance metadata service.

Wire format: "Spot Instance interruption notices", "EC2 instance rebalance recommendations" and "Use
the Instance Metadata Service" (IMDSv2) of the Amazon EC2 user guide.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from spotspeed.coordinator.notice.contract import Notice
from spotspeed.coordinator.notice.fetch import (
    Address,
    Response,
    parse_moment,
    parse_object,
    request,
)
from spotspeed.coordinator.notice.watch import LookError, Sighting, Watch

_PERIOD_S = 2.0
_TIMEOUT_S = 2.0
_TOKEN_TTL_S = 21600
_TOKEN_BYTES_MAX = 4096
_ENDPOINT = "http://169.254.169.254"
_TOKEN = "/latest/api/token"
_ACTION = "/latest/meta-data/spot/instance-action"
_REBALANCE = "/latest/meta-data/events/recommendations/rebalance"


def ec2_source(environ: Mapping[str, str] = os.environ, *, period_s: float = _PERIOD_S) -> Watch:
    """Watches IMDSv2, at AWS_EC2_METADATA_SERVICE_ENDPOINT where that is set.

    terminate, stop and hibernate all end the process: `stop` is true. A rebalance recommendation
    is a hint. Raises ConfigError for an endpoint that is not an http URL.
    """
    url = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or _ENDPOINT
    return Watch("ec2", _Ec2Look(Address.parse(url)), period_s=period_s)


class _Ec2Look:
    def __init__(self, address: Address) -> None:
        self._address = address
        self._token: str | None = None

    def __call__(self, stop_fd: int) -> Iterator[Sighting]:
        action = self._get(_ACTION, stop_fd)
        if action is not None:
            what, moment = (_text(action, _ACTION, field) for field in ("action", "time"))
            notice = Notice("ec2", _seconds_until(moment, action), stop=True)
            yield Sighting(f"{what} {moment}", notice)
        hint = self._get(_REBALANCE, stop_fd)
        if hint is not None:
            key = f"rebalance {_text(hint, _REBALANCE, 'noticeTime')}"
            yield Sighting(key, Notice("ec2-rebalance", None, stop=False))

    def _get(self, path: str, stop_fd: int) -> Response | None:
        response = self._get_once(path, stop_fd)
        if response.status == 401:
            self._token = None
            response = self._get_once(path, stop_fd)
        if response.status == 404:
            return None
        if response.status != 200:
            raise LookError(f"{path}: status {response.status}")
        return response

    def _get_once(self, path: str, stop_fd: int) -> Response:
        if self._token is None:
            self._token = self._new_token(stop_fd)
        headers = {"X-aws-ec2-metadata-token": self._token} if self._token else {}
        return request(
            "GET", self._address, path, headers=headers, timeout_s=_TIMEOUT_S, stop_fd=stop_fd
        )

    def _new_token(self, stop_fd: int) -> str:
        """A session token, or "" where the service knows only IMDSv1."""
        response = request(
            "PUT", self._address, _TOKEN, timeout_s=_TIMEOUT_S, stop_fd=stop_fd,
            headers={"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)},
        )  # fmt: skip
        if response.status in (403, 404, 405):
            return ""
        token = response.body[: _TOKEN_BYTES_MAX + 1].decode("latin-1").strip()
        is_usable = token.isascii() and token.isprintable() and len(token) <= _TOKEN_BYTES_MAX
        if response.status != 200 or not token or not is_usable:
            raise LookError(f"{_TOKEN}: status {response.status} and no usable token")
        return token


def _text(response: Response, path: str, field: str) -> str:
    found = parse_object(response, path).get(field)
    if not isinstance(found, str) or not found:
        raise LookError(f"{path}: no {field!r}: {response.body[:80]!r}")
    return found


def _seconds_until(moment: str, response: Response) -> float | None:
    moment_s = parse_moment(moment)
    return None if moment_s is None else max(0.0, moment_s - response.date_s)
