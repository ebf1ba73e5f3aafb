"""Where ranks listen and how they find each other, on one host and across network namespaces."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spotspeed.coordinator.address import Endpoint, endpoint_of, network_namespace, open_listener
from spotspeed.errors import CoordinationError

RANK = """
import json, select, sys
from pathlib import Path
from spotspeed.coordinator.bootstrap import bootstrap
from spotspeed.coordinator.transport import PeerDown
from spotspeed.testing.network import DirectoryRendezvous

rank = int(sys.argv[2])
transport = bootstrap(rank=rank, world_size=2, peer_timeout_s=1.5, timeout_s=30,
                      rendezvous=DirectoryRendezvous(Path(sys.argv[1])))
print(json.dumps("up"), flush=True)
poller = select.poll()
poller.register(transport.fileno(), select.POLLIN)
while True:
    poller.poll(transport.wait_s() * 1000)
    for event in transport.handle():
        print(json.dumps(event.why if isinstance(event, PeerDown) else event.payload.decode()))
        sys.exit()
"""


def endpoint(rank: int, namespace: str, *hosts: str) -> Endpoint:
    return Endpoint(rank, namespace, hosts, 4000 + rank)


def test_ranks_of_one_namespace_try_loopback_first() -> None:
    one, two = endpoint(0, "a", "10.0.0.1"), endpoint(1, "a", "10.0.0.1", "fd00::1")
    assert two.seen_from(one) == ["127.0.0.1", "10.0.0.1", "fd00::1"]


def test_ranks_of_different_machines_never_try_each_others_loopback() -> None:
    one, two = endpoint(0, "a", "10.0.0.1"), endpoint(1, "b", "127.0.0.1", "10.0.0.2")
    assert two.seen_from(one) == ["10.0.0.2"]


def test_an_endpoint_survives_its_encoding() -> None:
    original = endpoint(3, "boot/net:[1]", "10.0.0.1", "fd00::1")
    assert Endpoint.decode(original.encode()) == original


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"rank": 0}',
        b'{"rank": 0, "namespace": "a", "port": 1, "hosts": ["example.org"]}',
        b'{"rank": "x", "namespace": "a", "port": 1, "hosts": []}',
    ],
)
def test_what_is_no_endpoint_is_refused(data: bytes) -> None:
    with pytest.raises(CoordinationError, match="not the endpoint"):
        Endpoint.decode(data)


@pytest.mark.parametrize("master", ["localhost", "127.0.0.1", "127.0.1.1", "::1"])
def test_a_job_on_loopback_does_not_listen_elsewhere(master: str) -> None:
    with open_listener(master_host=master) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        assert endpoint_of(0, listener, master_host=master).hosts == ("127.0.0.1",)


def test_a_hosts_own_name_is_not_loopback_even_where_it_maps_to_it() -> None:
    with open_listener(master_host=socket.gethostname()) as listener:
        assert listener.getsockname()[0] in ("::", "0.0.0.0")


def test_a_listener_on_all_interfaces_takes_ipv4() -> None:
    with open_listener(master_host=None) as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 5).close()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def can_make_namespaces() -> bool:
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    probe = f"spotprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return made.returncode == 0


Hosts = dict[str, tuple[str, ...]]


@pytest.fixture
def hosts() -> Iterator[Callable[[Hosts], list[str]]]:
    """Makes two linked network namespaces that have the addresses given for "left" and "right"."""
    if not can_make_namespaces():
        pytest.skip("network namespaces need root and iproute2")
    names = {side: f"spot{side}{os.getpid()}" for side in ("left", "right")}

    def make(addresses: Hosts) -> list[str]:
        for name in names.values():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        left, right = names.values()
        ip("-n", left, "link", "add", "veth0", "type", "veth", "peer", "veth0", "netns", right)
        for side, name in names.items():
            for address in addresses[side]:
                nodad = ["nodad"] if ":" in address else []
                ip("-n", name, "addr", "add", address, "dev", "veth0", *nodad)
            ip("-n", name, "link", "set", "veth0", "up")
        return [left, right]

    yield make
    for name in names.values():
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def start_rank(
    name: str, directory: Path, rank: int, environ: dict[str, str]
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, "-c", RANK, str(directory), str(rank)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **environ},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("addresses", "environ"),
    [
        ({"left": ("10.77.0.1/24",), "right": ("10.77.0.2/24",)}, {"MASTER_ADDR": "10.77.0.1"}),
        ({"left": ("10.77.0.1/24",), "right": ("10.77.0.2/24",)}, {}),
        ({"left": ("fd77::1/64",), "right": ("fd77::2/64",)}, {"MASTER_ADDR": "fd77::1"}),
        (
            {"left": ("192.168.9.1/32", "10.77.0.1/24"), "right": ("10.77.0.2/24",)},
            {"GLOO_SOCKET_IFNAME": "veth0"},
        ),
    ],
    ids=["IPv4", "no master known", "IPv6", "first address unreachable"],
)
def test_two_hosts_meet_and_a_link_that_goes_down_is_a_silence(
    hosts: Callable[[Hosts], list[str]], tmp_path: Path, addresses: Hosts, environ: dict[str, str]
) -> None:
    names = hosts(addresses)
    ranks = [start_rank(name, tmp_path, rank, environ) for rank, name in enumerate(names)]
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert json.loads(rank.stdout.readline()) == "up"
        ip("-n", names[0], "link", "set", "veth0", "down")
        for rank in ranks:
            assert rank.stdout is not None
            assert "silent for" in json.loads(rank.stdout.readline())
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_the_namespace_of_another_network_is_another(
    hosts: Callable[[Hosts], list[str]],
) -> None:
    name, _ = hosts({"left": (), "right": ()})
    script = "from spotspeed.coordinator.address import network_namespace as n; print(n())"
    told = subprocess.run(
        ["ip", "netns", "exec", name, sys.executable, "-c", script],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout.strip() != network_namespace()
