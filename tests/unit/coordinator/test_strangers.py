"""Whatever connects to a rank without the job's secret costs that connection and nothing else."""

from __future__ import annotations

import contextlib
import random
import resource
import socket
import time
from collections.abc import Iterator

import pytest

from spotspeed.coordinator.reception import STRANGERS_MAX
from spotspeed.coordinator.wire import MESSAGE, Session
from spotspeed.testing.network import SECRET, Network, socket_network


class Guest:
    """A raw connection to rank 0 of `network`."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.socket = socket.create_connection(("127.0.0.1", port_of(network, 0)))
        self.socket.setblocking(False)

    def say(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.socket.send(data)

    def hear(self) -> bytes | None:
        """What has come; None when rank 0 has closed the connection."""
        try:
            return self.socket.recv(1 << 20) or None
        except BlockingIOError:
            return b""
        except ConnectionResetError:
            return None

    def await_close(self) -> None:
        self._network.run(lambda: self.hear() is None)


def port_of(network: Network, rank: int) -> int:
    return network.transports[rank]._endpoints[rank].port  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def network() -> Iterator[Network]:
    with socket_network(3, peer_timeout_s=2.0) as made:
        for rank in (1, 2):
            made.transports[rank].send(0, b"hello")
        made.run(lambda: all(made.payloads(0, rank) for rank in (1, 2)))
        yield made


def assert_unharmed(network: Network) -> None:
    """All ranks still talk, and nobody was lost or heard that is not of the job."""
    before = len(network.payloads(1, 0))
    network.transports[0].send(1, b"still here")
    network.run(lambda: len(network.payloads(1, 0)) == before + 1)
    for rank in network.transports:
        assert not network.downs(rank)
    assert [e.payload for e in network.events[0]] == [b"hello"] * 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00" * 4096,
        b"spotctl1" + b"\xff" * 24,
        b"spotctl1" + bytes(400),
        random.Random(7).randbytes(65536),
    ],
    ids=["http", "zeros", "impossible ranks", "too much", "random"],
)
def test_garbage_is_hung_up_on(network: Network, data: bytes) -> None:
    guest = Guest(network)
    guest.say(data)
    guest.await_close()
    assert_unharmed(network)


def test_a_guest_without_the_secret_is_hung_up_on_and_learns_nothing_of_use(
    network: Network,
) -> None:
    guest = Guest(network)
    session = Session(b"guessed", rank=1, world_size=3, target=0)
    guest.say(bytes(session.outgoing))
    answers: list[bytes] = []

    def is_answered() -> bool:
        heard = guest.hear()
        assert heard is not None
        answers.append(heard)
        return len(b"".join(answers)) == 48

    network.run(is_answered)
    guest.say(bytes(32))
    guest.await_close()
    assert_unharmed(network)


@pytest.mark.parametrize("count", [0, 1, 7, 31])
def test_an_opening_that_stops_half_way_is_ended_by_the_timeout(
    network: Network, count: int
) -> None:
    guest = Guest(network)
    guest.say(bytes(Session(SECRET, rank=1, world_size=3, target=0).outgoing[:count]))
    guest.await_close()
    assert_unharmed(network)


def test_a_flood_of_connections_is_bounded_and_a_late_rank_still_gets_through() -> None:
    with socket_network(2) as network:
        guests = []
        for _ in range(3 * STRANGERS_MAX):
            guests.append(Guest(network))
            network.transports[0].handle()
        network.transports[1].send(0, b"let me in")
        network.run(lambda: network.payloads(0, 1) == [b"let me in"])
        closed = sum(guest.hear() is None for guest in guests)
        assert closed >= len(guests) - (STRANGERS_MAX + 2)
        assert not network.downs(0)
        assert not network.downs(1)


def test_a_flood_of_bytes_does_not_keep_the_ranks_from_talking(network: Network) -> None:
    guests = [Guest(network) for _ in range(20)]
    for index in range(100):
        for guest in guests:
            guest.say(bytes(65536))
        network.transports[1].send(2, b"%d" % index)
        network.run(lambda n=index: len(network.payloads(2, 1)) == n + 1)
    assert_unharmed(network)


def test_running_out_of_descriptors_neither_spins_nor_loses_a_peer(network: Network) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    guests = [Guest(network) for _ in range(30)]
    used = max(guest.socket.fileno() for guest in guests)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, hard))
    turns = 0

    def count() -> bool:
        nonlocal turns
        turns += 1
        return time.monotonic() >= end_s

    end_s = time.monotonic() + 1.0
    try:
        network.run(count)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert turns < 300
    assert_unharmed(network)
    for guest in guests:
        guest.await_close()


def test_a_second_claim_to_be_a_connected_rank_is_refused(network: Network) -> None:
    guest = Guest(network)
    session = Session(SECRET, rank=1, world_size=3, target=0)

    def converse() -> bool:
        guest.say(bytes(session.outgoing))
        session.outgoing.clear()
        heard = guest.hear()
        if heard:
            session.feed(heard)
        return heard is None

    network.run(converse)
    assert_unharmed(network)


def test_a_rank_whose_stream_is_tampered_with_is_down_and_its_frame_is_not_delivered() -> None:
    with socket_network(2) as network:
        guest = Guest(network)
        session = Session(SECRET, rank=1, world_size=2, target=0)

        def is_connected() -> bool:
            guest.say(bytes(session.outgoing))
            session.outgoing.clear()
            session.feed(guest.hear() or b"")
            return session.is_authenticated

        network.run(is_connected, without=[1])
        session.queue(MESSAGE, b"transfer 5")
        guest.say(bytes(session.outgoing).replace(b"5", b"9"))
        network.run(lambda: bool(network.downs(0)), without=[1])
        assert "protocol violation" in network.downs(0)[0].why
        assert network.payloads(0, 1) == []
