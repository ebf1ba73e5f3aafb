"""Ordinary saves yield to the training; the save of a notice does not."""

from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spotspeed.agent.arena import create_arena
from spotspeed.agent.choosing import Chooser
from spotspeed.agent.process import NICE, lower_priority
from spotspeed.agent.sealing import Sealer
from spotspeed.agent.session import Session
from spotspeed.core.chunks import pack
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket
from spotspeed.core.saver_protocol import Begin, Chunks, Decoder, End, Hello, Sealed, encode
from spotspeed.storage.contract import Writer
from spotspeed.storage.local import LocalStorage

SLOT_BYTES = 4096


def own_niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


class WatchedStorage(LocalStorage):
    """Remembers how nice the threads are that write shards."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.niceness: list[int] = []
        self.policies: set[int] = set()

    def writer(self, key: str) -> Writer:
        if key.endswith(".shard"):
            self.niceness.append(own_niceness())
            self.policies.add(os.sched_getscheduler(0))
        return super().writer(key)


class House:
    """What a session needs around it."""

    def __init__(self, storage: WatchedStorage) -> None:
        self.storage, self.sealer = storage, Sealer(storage)
        self.encoders = ThreadPoolExecutor(1, initializer=lower_priority)
        self.urgent_encoders = ThreadPoolExecutor(1)
        self.chooser = Chooser("", 1)

    def began(self, save: object) -> None:
        """Nobody waits for it here."""


def store_one(reason: str, folder: Path) -> WatchedStorage:
    """Store a small save of one rank through a session, and wait for its seal."""
    house = House(WatchedStorage(folder))
    near, far = socket.socketpair()
    hello = Hello(0, os.getpid(), 8 * SLOT_BYTES, SLOT_BYTES)
    session = Session(far, 0, hello, create_arena(hello, 1 << 30))
    server = threading.Thread(target=session.serve, args=(house, Decoder()))
    server.start()
    fragment = Fragment(TensorKey("fp32", "w"), "uint8", (8,), Interval(0, 8))
    layout = pack([fragment], chunk_bytes=SLOT_BYTES)
    ticket = Ticket(1, 3, "a", "step-3", reason, 1, 0)
    begin = Begin(1, ticket, 0, SLOT_BYTES, len(layout.chunks), layout.raw_bytes, "", (fragment,))
    for message in (begin, Chunks(1, 0, (0,)), End(1)):
        near.sendall(encode(message))
    decoder, is_sealed = Decoder(), False
    near.settimeout(60)
    while not is_sealed:
        is_sealed = any(isinstance(message, Sealed) for message in decoder.feed(near.recv(1 << 16)))
    near.close()
    server.join(60)
    return house.storage


def test_a_periodic_save_is_stored_by_a_thread_that_yields(tmp_path: Path) -> None:
    storage = store_one("periodic", tmp_path)
    assert set(storage.niceness) == {min(19, own_niceness() + NICE)}
    assert storage.policies == {os.SCHED_BATCH}


def test_the_save_of_a_notice_is_stored_by_a_thread_that_does_not(tmp_path: Path) -> None:
    storage = store_one("notice", tmp_path)
    assert set(storage.niceness) == {own_niceness()}
    assert storage.policies == {os.sched_getscheduler(0)}
