"""Where a rank listens, and which of its addresses another rank should try first.

A rank publishes every address of its interfaces, best first: those of the interfaces named by
GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, the one that routes to MASTER_ADDR, the one of the
default route, the others. No name is resolved but MASTER_ADDR. Ranks of one network namespace meet
on loopback; where MASTER_ADDR itself is a loopback address, nothing else is listened on.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from spotspeed.coordinator.interfaces import interface_hosts
from spotspeed.errors import CoordinationError

_HOSTS_MAX = 16
_DOCUMENTATION_HOSTS = ("192.0.2.1", "2001:db8::1")
"""Addresses that no packet is ever sent to (RFC 5737, RFC 3849): they find the default route."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one rank listens; `namespace` is equal for ranks that share a loopback interface."""

    rank: int
    namespace: str
    hosts: tuple[str, ...]
    port: int

    def encode(self) -> bytes:
        """The endpoint as JSON."""
        fields = {"rank": self.rank, "namespace": self.namespace, "port": self.port}
        return json.dumps({**fields, "hosts": list(self.hosts)}).encode()

    @classmethod
    def decode(cls, data: bytes) -> Endpoint:
        """The inverse of `encode`; raises CoordinationError for anything else."""
        try:
            found = json.loads(data)
            hosts = tuple(str(ipaddress.ip_address(host)) for host in found["hosts"][:_HOSTS_MAX])
            return cls(int(found["rank"]), str(found["namespace"]), hosts, int(found["port"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CoordinationError(f"not the endpoint of a rank: {data[:200]!r}") from error

    def seen_from(self, other: Endpoint) -> list[str]:
        """The numeric addresses at which `other` should try to reach this rank, in order."""
        hosts = [host for host in self.hosts if not ipaddress.ip_address(host).is_loopback]
        if self.namespace == other.namespace:
            return ["127.0.0.1", *hosts]
        return hosts or list(self.hosts)


def open_listener(*, master_host: str | None) -> socket.socket:
    """A listening, non-blocking TCP socket on a port the kernel chose.

    It is bound to loopback where `master_host` is a loopback address, else to all interfaces, for
    IPv6 and IPv4 alike where the machine has IPv6.
    """
    if master_host is not None and _is_loopback(master_host):
        return _listen(socket.AF_INET, "127.0.0.1")
    try:
        return _listen(socket.AF_INET6, "::")
    except OSError:
        return _listen(socket.AF_INET, "0.0.0.0")


def endpoint_of(rank: int, listener: socket.socket, *, master_host: str | None) -> Endpoint:
    """What `rank`, listening on `listener`, tells the others."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_loopback:
        return Endpoint(rank, network_namespace(), (host,), port)
    found = list(dict.fromkeys(_own_hosts(master_host, os.environ)))
    if listener.family == socket.AF_INET:
        found = [host for host in found if ":" not in host]
    return Endpoint(rank, network_namespace(), tuple(found[:_HOSTS_MAX]) or ("127.0.0.1",), port)


def network_namespace() -> str:
    """Equal in two processes if and only if they share their loopback interface."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/net')}"


def _listen(family: socket.AddressFamily, host: str) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((host, 0))
        listener.listen(1024)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _own_hosts(master_host: str | None, environ: Mapping[str, str]) -> Iterator[str]:
    interfaces = [(name, host) for name, host in interface_hosts() if _is_useful(host)]
    preferred = _preferred_interfaces(environ)
    yield from (host for name, host in interfaces if name.startswith(preferred))
    for target in (master_host, *_DOCUMENTATION_HOSTS):
        host = _routed_host(target) if target else None
        if host is not None and _is_useful(host):
            yield host
    yield from (host for _, host in interfaces)


def _preferred_interfaces(environ: Mapping[str, str]) -> tuple[str, ...]:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        names = environ.get(variable, "")
        if names and not names.startswith("^"):
            return tuple(name for name in names.lstrip("=").split(",") if name)
    return ()


def _routed_host(target: str) -> str | None:
    """This machine's address on the way to `target`; nothing is sent."""
    try:
        family, _, _, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return None


def _is_loopback(host: str) -> bool:
    """Whether `host` says loopback itself; a host's own name may map to 127.0.1.1 on it alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_useful(host: str) -> bool:
    address = ipaddress.ip_address(host)
    return not (address.is_loopback or address.is_link_local or address.is_unspecified)
