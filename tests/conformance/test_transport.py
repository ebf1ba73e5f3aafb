"""What every transport does, and what those with peers do when the peers misbehave or die."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from spotspeed.coordinator.address import Endpoint
from spotspeed.coordinator.mpi_transport import MpiTransport
from spotspeed.coordinator.native_transport import NativeTransport
from spotspeed.coordinator.sockets import SocketTransport
from spotspeed.coordinator.transport import (
    MESSAGE_BYTES_MAX,
    QUEUE_BYTES_MAX,
    PeerDown,
    Transport,
)
from spotspeed.errors import CoordinationError, PeerLostError
from spotspeed.testing import network as networks
from spotspeed.testing.network import (
    SECRET,
    Network,
    listeners,
    single_transport,
    socket_network,
    transport_type,
)


@pytest.fixture(params=["python", "native", "mixed", "mpi"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test here runs with the transport in Python, the native one, both, and MPI's."""
    if request.param == "mpi":
        pytest.importorskip("mpi4py")
    monkeypatch.setattr(networks, "kind", request.param)
    return str(request.param)


# Those that wait in real time need not wait for a mixture, too.
of_one_kind = pytest.mark.parametrize("kind", ["python", "native", "mpi"], indirect=True)
# MPI polls, and neither has addresses nor tells of a death before its silence does.
of_sockets = pytest.mark.parametrize("kind", ["python", "native"], indirect=True)


@contextlib.contextmanager
def local_network() -> Iterator[Network]:
    transport = single_transport()
    yield Network({0: transport})
    transport.close()


FACTORIES: dict[str, Callable[[], AbstractContextManager[Network]]] = {
    "local": local_network,
    "sockets of 1": lambda: socket_network(1),
    "sockets of 2": lambda: socket_network(2),
    "sockets of 5": lambda: socket_network(5),
}


@pytest.fixture(params=FACTORIES)
def network(request: pytest.FixtureRequest, kind: str) -> Iterator[Network]:
    with FACTORIES[request.param]() as made:
        yield made


def test_every_rank_reaches_every_rank_and_itself_in_order(network: Network) -> None:
    ranks = list(network.transports)
    sent = [b"%d" % i for i in range(200)]
    for payload in sent:
        for source in ranks:
            for target in ranks:
                network.transports[source].send(target, payload)

    def is_complete() -> bool:
        return all(len(network.payloads(t, s)) == len(sent) for s in ranks for t in ranks)

    network.run(is_complete)
    assert all(network.payloads(t, s) == sent for s in ranks for t in ranks)
    assert not any(network.downs(rank) for rank in ranks)


def test_payloads_of_any_size_up_to_the_limit_arrive_whole(network: Network) -> None:
    sent = [b"", b"x", bytes(range(256)) * 1000, b"\xff" * MESSAGE_BYTES_MAX, b"end"]
    last = max(network.transports)
    for payload in sent:
        network.transports[0].send(last, payload)
    network.run(lambda: len(network.payloads(last, 0)) == len(sent))
    assert network.payloads(last, 0) == sent


def test_too_large_a_payload_and_an_unknown_rank_are_refused(network: Network) -> None:
    transport = network.transports[0]
    with pytest.raises(ValueError, match="limit"):
        transport.send(0, b"x" * (MESSAGE_BYTES_MAX + 1))
    for rank in (-1, transport.world_size):
        with pytest.raises(ValueError, match="does not exist"):
            transport.send(rank, b"x")
        with pytest.raises(ValueError, match="does not exist"):
            transport.connect(rank)


def test_the_descriptor_is_readable_for_as_long_as_there_is_work_only(network: Network) -> None:
    transport = network.transports[0]
    poller = select.poll()
    poller.register(transport.fileno(), select.POLLIN)
    assert transport.handle() == []
    assert poller.poll(0) == []
    transport.send(0, b"x")
    assert poller.poll(0) != []
    assert len(transport.handle()) == 1
    assert poller.poll(0) == []
    assert transport.wait_s() > 0


def test_close_is_idempotent_and_what_is_sent_later_touches_nothing(network: Network) -> None:
    transport = network.transports[0]
    transport.close(drain_s=1)
    transport.close()
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
    other_fd = os.eventfd(0, os.EFD_NONBLOCK)
    for rank in network.transports:
        transport.connect(rank)
        transport.send(rank, b"too late")
    assert transport.handle() == []
    with pytest.raises(BlockingIOError):
        os.read(read_fd, 1)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(other_fd)
    for descriptor in (read_fd, write_fd, other_fd):
        os.close(descriptor)


def star(network: Network) -> None:
    """Connect every rank with rank 0."""
    others = [rank for rank in network.transports if rank != 0]
    for rank in others:
        network.transports[rank].send(0, b"hello")
    network.run(lambda: all(network.payloads(0, rank) for rank in others))


@of_sockets
def test_an_idle_network_stays_up_and_hardly_wakes() -> None:
    with socket_network(3, peer_timeout_s=0.5) as network:
        star(network)
        turns = 0

        def count() -> bool:
            nonlocal turns
            turns += 1
            return time.monotonic() >= end_s

        end_s = time.monotonic() + 2.0
        network.run(count)
        assert not any(network.downs(rank) for rank in network.transports)
        # Three ranks tick every 50 ms and hear each other's heartbeats: some 150 to 250 turns.
        assert turns < 500


def test_an_orderly_close_delivers_everything_first() -> None:
    with socket_network(2) as network:
        star(network)
        sent = [bytes([i]) * 500_000 for i in range(16)]
        for payload in sent:
            network.transports[1].send(0, payload)
        # The other end reads on while this one drains: two threads of control, as in life.
        closing = iter_close(network.transports[1])
        network.run(lambda: next(closing) and bool(network.downs(0)), without=[1])
        assert network.payloads(0, 1) == [b"hello", *sent]
        assert network.downs(0) == [PeerDown(1, "closed its transport", is_orderly=True)]


def iter_close(transport: Transport) -> Iterator[bool]:
    """Close on a thread of its own; yields True once that is done."""
    thread = threading.Thread(target=transport.close, kwargs={"drain_s": 20})
    thread.start()
    while thread.is_alive():
        yield False
    while True:
        yield True


def test_what_is_sent_to_a_peer_that_closed_is_dropped() -> None:
    with socket_network(2) as network:
        star(network)
        network.transports[1].close()
        network.run(lambda: bool(network.downs(0)), without=[1])
        network.transports[0].send(1, b"too late")
        network.transports[0].connect(1)
        network.run_for(0.3, without=[1])
        assert len(network.downs(0)) == 1


@of_one_kind
def test_a_silent_peer_is_down_after_the_timeout_and_not_before() -> None:
    with socket_network(2, peer_timeout_s=1.0) as network:
        star(network)
        begin_s = time.monotonic()
        network.run(lambda: bool(network.downs(0)), without=[1])
        assert 0.8 < time.monotonic() - begin_s < 5.0
        assert "silent" in network.downs(0)[0].why
        assert not network.downs(0)[0].is_orderly


@of_one_kind
def test_ones_own_pause_is_not_held_against_the_others() -> None:
    with socket_network(3, peer_timeout_s=1.0) as network:
        star(network)
        # Nobody runs for longer than the timeout, as when a whole machine is suspended.
        time.sleep(1.5)
        network.run_for(1.5)
        assert not any(network.downs(rank) for rank in network.transports)


@of_one_kind
def test_a_pause_shorter_than_the_timeout_costs_nothing() -> None:
    with socket_network(2, peer_timeout_s=2.0) as network:
        star(network)
        network.run_for(1.2, without=[1])
        network.transports[0].send(1, b"after")
        network.run(lambda: network.payloads(1, 0) == [b"after"])
        assert not network.downs(0)
        assert not network.downs(1)


def test_a_peer_that_does_not_read_is_down_when_its_queue_is_full() -> None:
    with socket_network(2) as network:
        star(network)
        for _ in range(2 * QUEUE_BYTES_MAX // MESSAGE_BYTES_MAX):
            network.transports[0].send(1, b"x" * MESSAGE_BYTES_MAX)
        network.run(lambda: bool(network.downs(0)), without=[1])
        assert "does not read" in network.downs(0)[0].why


@of_sockets
def test_a_rank_whose_process_is_gone_is_found_out_at_once() -> None:
    with socket_network(2, peer_timeout_s=60.0) as network:
        network.transports[1].close()
        begin_s = time.monotonic()
        network.transports[0].send(1, b"anyone?")
        network.run(lambda: bool(network.downs(0)), without=[1])
        assert time.monotonic() - begin_s < 10.0
        assert "cannot be reached at 127.0.0.1" in network.downs(0)[0].why


@of_sockets
def test_a_rank_that_accepts_and_says_nothing_is_down_after_the_timeout() -> None:
    sockets, endpoints = listeners(2)
    transport = transport_type(0)(
        rank=0, secret=SECRET, listener=sockets[0], endpoints=endpoints, peer_timeout_s=1.0
    )
    network = Network({0: transport})
    begin_s = time.monotonic()
    transport.send(1, b"anyone?")
    network.run(lambda: bool(network.downs(0)))
    assert 0.8 < time.monotonic() - begin_s < 6.0
    transport.close()
    sockets[1].close()


def test_messages_wait_for_a_rank_that_is_slow_to_accept() -> None:
    with socket_network(2, peer_timeout_s=5.0) as network:
        for i in range(10):
            network.transports[0].send(1, b"%d" % i)
        network.run_for(0.5, without=[1])
        network.run(lambda: len(network.payloads(1, 0)) == 10)
        assert network.payloads(1, 0) == [b"%d" % i for i in range(10)]


def test_two_ranks_that_dial_each_other_at_once_lose_nothing() -> None:
    for _ in range(20):
        with socket_network(2) as network:
            for i in range(50):
                network.transports[0].send(1, b"a%d" % i)
                network.transports[1].send(0, b"b%d" % i)
            network.run(lambda n=network: len(n.payloads(1, 0)) == len(n.payloads(0, 1)) == 50)
            assert network.payloads(1, 0) == [b"a%d" % i for i in range(50)]
            assert network.payloads(0, 1) == [b"b%d" % i for i in range(50)]
            assert not network.downs(0)
            assert not network.downs(1)


def test_the_survivors_of_rank_0_find_each_other() -> None:
    with socket_network(4) as network:
        star(network)
        network.transports[0].close()
        alive = [1, 2, 3]
        network.run(lambda: all(network.downs(rank) for rank in alive), without=[0])
        for rank in (2, 3):
            network.transports[rank].send(1, b"lead us")
        network.run(lambda: all(network.payloads(1, rank) for rank in (2, 3)), without=[0])
        for rank in (2, 3):
            network.transports[1].send(rank, b"follow")
        network.run(lambda: all(network.payloads(r, 1) for r in (2, 3)), without=[0])


def test_establish_keeps_what_arrived_for_the_first_handle() -> None:
    with socket_network(3) as network:
        zero, one, two = (network.transports[rank] for rank in range(3))
        assert isinstance(zero, SocketTransport | NativeTransport | MpiTransport)
        assert isinstance(one, SocketTransport | NativeTransport | MpiTransport)
        assert isinstance(two, SocketTransport | NativeTransport | MpiTransport)
        one.send(0, b"early")
        threads = [threading.Thread(target=each.establish, args=(20,)) for each in (zero, one)]
        for thread in threads:
            thread.start()
        two.establish(20)
        for thread in threads:
            thread.join()
        poller = select.poll()
        poller.register(zero.fileno(), select.POLLIN)
        network.run(lambda: network.payloads(0, 1) == [b"early"])


def test_establish_names_the_ranks_that_are_missing() -> None:
    with socket_network(3) as network:
        zero = network.transports[0]
        assert isinstance(zero, SocketTransport | NativeTransport | MpiTransport)
        with pytest.raises(CoordinationError, match=r"2 of 3 ranks.*\[1, 2\]"):
            zero.establish(0.2)


@of_sockets
def test_establish_fails_at_once_when_rank_0_is_gone() -> None:
    with socket_network(2) as network:
        network.transports[0].close()
        one = network.transports[1]
        assert isinstance(one, SocketTransport | NativeTransport | MpiTransport)
        with pytest.raises(PeerLostError, match="rank 0 is gone"):
            one.establish(60)


@of_sockets
def test_the_first_address_need_not_be_the_right_one() -> None:
    sockets, endpoints = listeners(2)
    # A rank of the same network namespace is looked for on loopback first: pretend another machine.
    far = Endpoint(1, "another machine", ("127.0.0.2", "127.0.0.1"), endpoints[1].port)
    transport = transport_type(0)(
        rank=0, secret=SECRET, listener=sockets[0], endpoints={**endpoints, 1: far},
        peer_timeout_s=5.0,
    )  # fmt: skip
    other = transport_type(1)(
        rank=1, secret=SECRET, listener=sockets[1], endpoints=endpoints, peer_timeout_s=5.0
    )
    network = Network({0: transport, 1: other})
    transport.send(1, b"found")
    network.run(lambda: network.payloads(1, 0) == [b"found"])
    transport.close()
    other.close()
