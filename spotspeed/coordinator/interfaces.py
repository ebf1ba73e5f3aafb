"""Lists the addresses of this machine's network interfaces, by rtnetlink (rtnetlink(7))."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator

_RTM_GETADDR = 22
_RTM_NEWADDR = 20
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST_DUMP = 0x301
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_MESSAGE = struct.Struct("=IHHII")
_IFADDR = struct.Struct("=BBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_TIMEOUT_S = 5.0


def interface_hosts() -> Iterator[tuple[str, str]]:
    """(interface, numeric address) of all, as the kernel orders them; IPv4 and IPv6."""
    names = dict(socket.if_nameindex())
    request = _IFADDR.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    head = _MESSAGE.pack(_MESSAGE.size + len(request), _RTM_GETADDR, _REQUEST_DUMP, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as link:
        link.settimeout(_TIMEOUT_S)
        link.sendto(head + request, (0, 0))
        while True:
            data = link.recv(1 << 16)
            while data:
                length, kind, _, _, _ = _MESSAGE.unpack_from(data)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    return
                if kind == _RTM_NEWADDR:
                    index, host = _parse(data[_MESSAGE.size : length])
                    if host is not None and index in names:
                        yield names[index], host
                data = data[_aligned(length) :]


def _parse(body: bytes) -> tuple[int, str | None]:
    index = _IFADDR.unpack_from(body)[4]
    found: dict[int, bytes] = {}
    body = body[_IFADDR.size :]
    while len(body) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(body)
        found[kind] = body[_ATTRIBUTE.size : length]
        body = body[max(_aligned(length), _ATTRIBUTE.size) :]
    # On a point-to-point link IFA_ADDRESS is the other end's.
    packed = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS))
    return index, None if packed is None else str(ipaddress.ip_address(packed))


def _aligned(length: int) -> int:
    return (length + 3) & ~3
