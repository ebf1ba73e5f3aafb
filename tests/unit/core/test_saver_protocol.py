"""Messages of the saver survive the wire, and nothing else is taken for one."""

from __future__ import annotations

import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket
from spotspeed.core.saver_protocol import (
    MAX_FRAME_BYTES,
    PREAMBLE_BYTES,
    Abandon,
    Begin,
    Bypassed,
    Chunks,
    Cost,
    Decoder,
    Describe,
    Drain,
    Drained,
    End,
    Failed,
    Freed,
    Hello,
    Kept,
    LostPart,
    Message,
    Need,
    Noticed,
    Notify,
    Progress,
    Refused,
    Renew,
    Sealed,
    Stored,
    UseTier,
    Welcome,
    decode,
    decode_preamble,
    encode,
    encode_preamble,
    socket_name,
)
from spotspeed.errors import FormatError

TICKET = Ticket(2, 10, "a", "step-10", "notice", 4, 1_700_000_000, "step-000000000008.e000001.a")
FRAGMENTS = (
    Fragment(TensorKey("fp32", "layer.0", ""), "float32", (4, 3), Interval(2, 12)),
    Fragment(TensorKey("step", "layer.0", "rank-1"), "int64", (), Interval(0, 1)),
)
MESSAGES: list[Message] = [
    Hello(3, 4711, 1 << 30, 1 << 22),
    Begin(1, TICKET, 3, 1 << 20, 7, 7 << 20, "zstd", FRAGMENTS, is_direct=True, described=4),
    Describe(4, 1 << 20, FRAGMENTS),
    Chunks(1, 5, (0, 9, 3)), End(1), Abandon(1, "held too long"), Need(4),
    LostPart("step-000000000010.e000002.a", 3, "its saver died"), Drain(2**53),
    Renew(2, 5.0), Notify(119.5, "ec2"), Welcome(4712, 1 << 30, 1 << 22),
    Refused("memory", "none left"), Freed((9,)), UseTier("/mnt/nvme"), Kept(1, 9),
    Bypassed(1, "full"), Stored(1), Sealed(1, b'{"body":{}}\n'),
    Failed(1, "disk full"), Progress(2, 1 << 40), Drained(("a",), (), ("b", "c")),
    Noticed(30.0, "file"), Cost(1, True, 9, 8, 0.5, 0.25),
]  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_survives_the_wire(message: Message) -> None:
    assert list(Decoder().feed(encode(message))) == [message]


@given(st.lists(st.integers(1, 200), min_size=1))
def test_messages_survive_any_cutting_of_the_stream(cuts: list[int]) -> None:
    stream = b"".join(encode(message) for message in MESSAGES)
    decoder, received, position = Decoder(), [], 0
    while position < len(stream):
        size = cuts[position % len(cuts)]
        received += decoder.feed(stream[position : position + size])
        position += size
    assert received == MESSAGES


@given(st.binary(max_size=200))
def test_a_hostile_payload_is_a_format_error(payload: bytes) -> None:
    try:
        message = decode(payload)
    except FormatError:
        return
    assert list(Decoder().feed(encode(message))) == [message]


@pytest.mark.parametrize("payload", [
    [99], [1], [1, 0, 1, 2], [1, 0, "x", 0, 0], [1, 0, True, 0, 0], [1, -1, 1, 0, 0],
    [3, 1, 0, [1, -2]], [3, 1, 0, "ab"], [37, 1, "text"],
    [2, 1, {"epoch": 1}, 0, 1, 1, 1, "", [], [], [], 0],
    [2, 1, None, 0, 1, 1, 1, "", [], [], [], False], [44, 1, 0, 9, 8, 0.5, 0.25], {"a": 1}, [],
])  # fmt: skip
def test_a_malformed_message_is_refused(payload: object) -> None:
    with pytest.raises(FormatError):
        decode(msgpack.packb(payload))


def test_a_fragment_outside_its_tensor_is_refused() -> None:
    packed = msgpack.unpackb(encode(MESSAGES[1])[4:])
    packed[8][0][6] = 13
    with pytest.raises(FormatError, match=r"Begin.fragments.*not all inside"):
        decode(msgpack.packb(packed))


def test_an_announced_frame_above_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(FormatError, match="announced"):
        list(Decoder().feed(struct.pack("<I", MAX_FRAME_BYTES + 1)))


def test_the_preamble_tells_version_and_process() -> None:
    data = encode_preamble(4711, version=9)
    assert len(data) == PREAMBLE_BYTES
    assert decode_preamble(data) == (9, 4711)
    with pytest.raises(FormatError):
        decode_preamble(b"GET / HTTP/1.1\r\n")


def test_users_and_paths_have_savers_of_their_own() -> None:
    names = {socket_name(uid, url) for uid in (0, 1000) for url in ("/a", "/b", "s3://a")}
    assert len(names) == 6
    assert all(len(name) < 100 for name in names), "sun_path holds 108 bytes"
