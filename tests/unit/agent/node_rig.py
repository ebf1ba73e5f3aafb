"""A saver's use of a node's tier without sessions: saves staged in memory and stored."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spotspeed.agent.arena import SlotArena
from spotspeed.agent.choosing import Chooser
from spotspeed.agent.incoming import IncomingSave, SaveProgress
from spotspeed.agent.ledger import SlotLedger
from spotspeed.agent.node_tier import NodeTier
from spotspeed.agent.sealing import Sealer
from spotspeed.agent.writing import RETRY_S, Workshop, store
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.tiers import NodePart, survey
from spotspeed.core.chunks import pack
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Manifest, Ticket
from spotspeed.core.saver_protocol import Begin
from spotspeed.errors import SpotSpeedError
from spotspeed.storage.contract import Storage
from spotspeed.storage.local import LocalStorage

LIMIT_S = 60.0
CHUNK = 256 * 1024
CHUNKS = 16


def ticket_of(step: int, *, epoch: int = 1, reason: str = "periodic") -> Ticket:
    return Ticket(epoch, step, "a", f"step-{step}", reason, 1, 0)


class House:
    """A server without sessions: the store, its sealer, and the saves that were announced."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.sealer = storage, Sealer(storage)
        self.saves: list[SaveProgress] = []

    def began(self, save: SaveProgress) -> None:
        self.saves.append(save)

    def wait(self) -> list[str]:
        """The states of the saves, once all are settled."""
        until(lambda: all(save.is_settled for save in self.saves))
        return [save.state for save in self.saves]


class Node:
    """One saver's use of a tier: stages whole saves in memory and stores them."""

    def __init__(self, path: Path | Storage, local_path: Path) -> None:
        storage = LocalStorage(path) if isinstance(path, Path) else path
        self.house = House(storage)
        self.tier = NodeTier(str(local_path), self.house)
        self.bypassed: list[str] = []
        self.outcomes: queue.SimpleQueue[SpotSpeedError | None] = queue.SimpleQueue()
        self._encoders = ThreadPoolExecutor(2)
        self.chooser = Chooser(storage.url, 2)

    def store(
        self, ticket: Ticket, *, chunks: int = CHUNKS, slots: int = CHUNKS, rank: int = 0,
        is_direct: bool = False, compression: str = "none",
    ) -> tuple[IncomingSave, NodePart | None]:  # fmt: skip
        """Store a save of `chunks` chunks through a pool of `slots`."""
        size = chunks * CHUNK
        fragment = Fragment(TensorKey("fp32", "w", f"rank-{rank}"), "uint8", (size,),
                            Interval(0, size))  # fmt: skip
        layout = pack([fragment], chunk_bytes=CHUNK)
        begin = Begin(1, ticket, rank, CHUNK, chunks, size, compression, (fragment,),
                      is_direct=is_direct)  # fmt: skip
        save, arena = IncomingSave(begin, layout), SlotArena(slots * CHUNK, CHUNK)
        free: queue.SimpleQueue[int] = queue.SimpleQueue()
        ledger = SlotLedger(slots, lambda given: [free.put(slot) for slot in given] and None)
        for slot in range(slots):
            free.put(slot)

        def stage() -> None:
            for chunk in layout.chunks:
                if chunk.index >= slots:
                    ledger.need(1)
                slot = free.get(timeout=LIMIT_S)
                if slot < 0:
                    return
                arena.view(slot, chunk.size_bytes)[:] = filling(ticket, chunk.index)
                ledger.take(1, [slot])
                save.add(chunk.index, (slot,))
            save.end()

        stager = threading.Thread(target=stage)
        stager.start()
        workshop = Workshop(
            self.house.storage, arena, ledger, self._encoders, lambda save: RETRY_S, self.chooser,
            self.tier, lambda save, cause: self.bypassed.append(cause),
        )  # fmt: skip
        try:
            part = store(save, workshop)
        finally:
            free.put(-1)
            stager.join()
            ledger.settle(1)
        return save, part

    def save(self, ticket: Ticket, **options: int) -> Manifest:
        """Store, drain, seal and note it, as a session does."""
        save, part = self.store(ticket, **options)
        if part is not None:
            self.tier.drain(part, save, self.outcomes.put)
            error = self.outcomes.get(timeout=LIMIT_S)
            if error is not None:
                raise error
        sealed: queue.SimpleQueue[Manifest | SpotSpeedError] = queue.SimpleQueue()
        self.house.sealer.add(save, lambda _, end: sealed.put(end), is_wanted=lambda: True)
        outcome = sealed.get(timeout=LIMIT_S)
        assert isinstance(outcome, Manifest), outcome
        self.tier.sealed(outcome)
        return outcome

    def held(self) -> list[str]:
        return [found.directory for found in survey(self.tier.node)]


def filling(ticket: Ticket, chunk: int) -> bytes:
    return bytes([(ticket.step + chunk) % 251]) * CHUNK


def until(condition: Callable[[], bool]) -> None:
    gate = threading.Event()
    for _ in range(int(LIMIT_S / 0.005)):
        if condition():
            return
        gate.wait(0.005)
    raise AssertionError("it did not happen")


def check(path: Path, ticket: Ticket, *, chunks: int = CHUNKS) -> None:
    """The checkpoint at the store is sealed and holds every byte."""
    storage = LocalStorage(path)
    reader = CheckpointReader.open(storage, ticket.directory)
    assert reader.verify().is_whole
    data = reader.read_tensor(TensorKey("fp32", "w", "rank-0")).tobytes()
    assert data == b"".join(filling(ticket, number) for number in range(chunks))


def node_path(node: Node) -> Path:
    return Path(node.tier.node.url)


def next_saver(first: Node, path: Path, local_path: Path) -> Node:
    """The next saver's use of what `first` left; a process that is gone holds no lock."""
    if first.tier._lock_file >= 0:
        os.close(first.tier._lock_file)
    return Node(path, local_path)
