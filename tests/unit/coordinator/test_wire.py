"""The control connection's protocol, byte by byte, without sockets."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotspeed.coordinator.transport import MESSAGE_BYTES_MAX
from spotspeed.coordinator.wire import GOODBYE, HEARTBEAT, MESSAGE, Frame, Session, WireError

SECRET = b"the job's"


def carry(source: Session, target: Session) -> list[Frame]:
    """Move all that `source` has to say to `target`."""
    data = bytes(source.outgoing)
    source.outgoing.clear()
    return target.feed(data)


def pair() -> tuple[Session, Session]:
    """Rank 1 connected to rank 0, both authenticated."""
    connector = Session(SECRET, rank=1, world_size=4, target=0)
    acceptor = Session(SECRET, rank=0, world_size=4, target=None)
    carry(connector, acceptor)
    carry(acceptor, connector)
    carry(connector, acceptor)
    assert carry(acceptor, connector) == [Frame(HEARTBEAT, b"")]
    return connector, acceptor


def test_both_sides_know_each_other_after_the_opening() -> None:
    connector, acceptor = pair()
    assert connector.is_authenticated
    assert acceptor.is_authenticated
    assert (connector.peer, acceptor.peer) == (0, 1)


def test_a_connector_believes_only_what_the_acceptor_confirms() -> None:
    connector = Session(SECRET, rank=1, world_size=2, target=0)
    acceptor = Session(SECRET, rank=0, world_size=2, target=None)
    carry(connector, acceptor)
    carry(acceptor, connector)
    assert connector.has_answered
    assert not connector.is_authenticated


@given(st.lists(st.binary(max_size=200), max_size=10), st.data())
@settings(max_examples=50)
def test_frames_survive_any_fragmentation(payloads: list[bytes], data: st.DataObject) -> None:
    connector, acceptor = pair()
    for payload in payloads:
        connector.queue(MESSAGE, payload)
    connector.queue(GOODBYE)
    stream = bytes(connector.outgoing)
    received: list[Frame] = []
    while stream:
        count = data.draw(st.integers(1, len(stream)))
        received += acceptor.feed(stream[:count])
        stream = stream[count:]
    assert [frame.payload for frame in received[:-1]] == payloads
    assert received[-1].kind == GOODBYE


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_changed_byte_of_a_frame_is_ever_delivered(position: int, change: int) -> None:
    connector, acceptor = pair()
    connector.queue(MESSAGE, b"a payload of some length")
    stream = bytearray(connector.outgoing)
    stream[position % len(stream)] ^= change
    # Enough follows for a length that grew to be complete.
    try:
        frames = acceptor.feed(bytes(stream) + bytes(MESSAGE_BYTES_MAX))
    except WireError:
        return
    assert frames == []


@given(st.integers(0, 1000), st.integers(1, 255), st.integers(0, 2))
def test_no_changed_byte_of_the_opening_is_accepted(pos: int, change: int, step: int) -> None:
    connector = Session(SECRET, rank=1, world_size=4, target=0)
    acceptor = Session(SECRET, rank=0, world_size=4, target=None)
    sides = [(connector, acceptor), (acceptor, connector), (connector, acceptor)]
    with pytest.raises(WireError):
        for index, (source, target) in enumerate(sides):
            if index == step:
                source.outgoing[pos % len(source.outgoing)] ^= change
            carry(source, target)


def test_a_repeated_or_omitted_frame_ends_the_connection() -> None:
    connector, acceptor = pair()
    connector.queue(MESSAGE, b"pay 5")
    once = bytes(connector.outgoing)
    assert acceptor.feed(once) == [Frame(MESSAGE, b"pay 5")]
    with pytest.raises(WireError, match="not authentic"):
        acceptor.feed(once)
    connector, acceptor = pair()
    connector.queue(MESSAGE, b"first")
    connector.outgoing.clear()
    connector.queue(MESSAGE, b"second")
    with pytest.raises(WireError, match="not authentic"):
        carry(connector, acceptor)


def test_a_frame_sent_back_to_its_sender_is_not_taken() -> None:
    connector, _ = pair()
    connector.queue(MESSAGE, b"echo")
    with pytest.raises(WireError, match="not authentic"):
        connector.feed(bytes(connector.outgoing))


def test_an_opening_recorded_once_is_of_no_use_later() -> None:
    connector = Session(SECRET, rank=1, world_size=2, target=0)
    acceptor = Session(SECRET, rank=0, world_size=2, target=None)
    hello = bytes(connector.outgoing)
    carry(connector, acceptor)
    carry(acceptor, connector)
    response = bytes(connector.outgoing)
    carry(connector, acceptor)
    victim = Session(SECRET, rank=0, world_size=2, target=None)
    victim.feed(hello)
    with pytest.raises(WireError, match="secret"):
        victim.feed(response)


def test_another_secret_is_refused_on_both_sides() -> None:
    stranger = Session(b"another", rank=1, world_size=2, target=0)
    acceptor = Session(SECRET, rank=0, world_size=2, target=None)
    carry(stranger, acceptor)
    with pytest.raises(WireError, match="acceptor does not know"):
        carry(acceptor, stranger)
    connector = Session(SECRET, rank=1, world_size=2, target=0)
    impostor = Session(b"another", rank=0, world_size=2, target=None)
    carry(connector, impostor)
    with pytest.raises(WireError, match="acceptor does not know"):
        carry(impostor, connector)


@pytest.mark.parametrize(("rank", "target"), [(1, 2), (0, 0), (9, 0)])
def test_a_hello_for_another_rank_or_from_none_is_refused(rank: int, target: int) -> None:
    connector = Session(SECRET, rank=rank, world_size=16, target=target)
    acceptor = Session(SECRET, rank=0, world_size=4, target=None)
    with pytest.raises(WireError, match="asks for rank"):
        carry(connector, acceptor)


def test_an_impossible_length_is_refused_before_its_bytes_are_awaited() -> None:
    for length in (MESSAGE_BYTES_MAX + 1, 0xFFFFFFFF):
        _, acceptor = pair()
        with pytest.raises(WireError, match="frame of kind"):
            acceptor.feed(struct.pack("<IB", length, MESSAGE))


@given(st.binary(min_size=1, max_size=300))
def test_garbage_is_refused_or_waited_for_but_never_answered(garbage: bytes) -> None:
    acceptor = Session(SECRET, rank=0, world_size=2, target=None)
    try:
        frames = acceptor.feed(garbage)
    except WireError:
        frames = []
    assert frames == []
    assert not acceptor.is_authenticated
