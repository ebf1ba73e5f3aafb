"""A save may refer to what was described before it, and to nothing else."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from spotspeed.agent.arena import create_arena
from spotspeed.agent.session import Session
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket, decode_manifest
from spotspeed.core.saver_protocol import (
    Begin,
    Chunks,
    Decoder,
    Describe,
    End,
    Hello,
    Message,
    Sealed,
    encode,
)
from spotspeed.storage.local import LocalStorage
from tests.unit.agent.test_priority import SLOT_BYTES, House, WatchedStorage

LIMIT_S = 60.0
STATE = Fragment(TensorKey("fp32", "w"), "uint8", (8,), Interval(0, 8))
BLOB = Fragment(TensorKey("blob", "rank"), "uint8", (8,), Interval(0, 8))


class Rank:
    """The rank's end of a session with slots 0 to 7, of which slot N holds bytes N."""

    def __init__(self, folder: Path) -> None:
        self.house = House(WatchedStorage(folder))
        self.socket, far = socket.socketpair()
        self.socket.settimeout(LIMIT_S)
        hello = Hello(0, os.getpid(), 8 * SLOT_BYTES, SLOT_BYTES)
        arena = create_arena(hello, 1 << 30)
        assert arena is not None
        for slot in range(8):
            arena.view(slot, SLOT_BYTES)[:] = bytes([slot]) * SLOT_BYTES
        self.session = Session(far, 0, hello, arena)
        self.thread = threading.Thread(target=self.session.serve, args=(self.house, Decoder()))
        self.thread.start()

    def tell(self, *messages: Message) -> None:
        self.socket.sendall(b"".join(encode(message) for message in messages))

    def seals(self, count: int) -> list[Sealed]:
        """What has been sealed, in order."""
        decoder, found = Decoder(), []
        while len(found) < count:
            data = self.socket.recv(1 << 16)
            assert data, "the session ended"
            found += [item for item in decoder.feed(data) if isinstance(item, Sealed)]
        return found

    def close(self) -> None:
        self.socket.close()
        self.thread.join(LIMIT_S)


def begin(number: int, described: int, *fragments: Fragment) -> Begin:
    ticket = Ticket(1, number, "a", f"step-{number}", "periodic", 1, 0)
    return Begin(number, ticket, 0, SLOT_BYTES, 2, 16, "", fragments, described=described)


def test_saves_hold_what_was_described_and_their_own(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    rank.tell(Describe(1, SLOT_BYTES, (STATE,)))
    for number in (1, 2):
        slots = (2 * number, 2 * number + 1)
        rank.tell(begin(number, 1, BLOB), Chunks(number, 0, slots), End(number))
    sealed = rank.seals(2)
    rank.close()
    for number, item in enumerate(sealed, start=1):
        manifest = decode_manifest(item.manifest, source="sealed")
        found = [(STATE, bytearray(8)), (BLOB, bytearray(8))]
        CheckpointReader(LocalStorage(tmp_path), manifest).read_into(found)
        assert [bytes(data) for _, data in found] == [
            bytes([2 * number]) * 8, bytes([2 * number + 1]) * 8
        ]  # fmt: skip


@pytest.mark.parametrize("described", [1, 3])
def test_a_save_of_an_unknown_description_ends_the_session(tmp_path: Path, described: int) -> None:
    rank = Rank(tmp_path)
    rank.tell(Describe(2, SLOT_BYTES, (STATE,)), begin(1, described, BLOB))
    with pytest.raises((AssertionError, ConnectionResetError)):
        rank.seals(1)
    rank.close()
    assert not list(tmp_path.rglob("*.shard"))
