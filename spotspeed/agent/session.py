"""One rank's session with the saver: reads its messages, stores its saves in order."""

from __future__ import annotations

import logging
import os
import queue
import select
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

from spotspeed.agent.arena import SlotArena
from spotspeed.agent.choosing import Chooser
from spotspeed.agent.draining import is_final
from spotspeed.agent.incoming import IncomingSave, SaveProgress, StoppedError
from spotspeed.agent.ledger import SlotLedger
from spotspeed.agent.node_tier import NodeTier
from spotspeed.agent.process import lower_priority, weigh_session
from spotspeed.agent.renewal import Renewal
from spotspeed.agent.sealing import HopelessError, Sealer
from spotspeed.agent.writing import LONG_RETRY_S, RETRY_S, Workshop, store
from spotspeed.checkpoint.commit import take_back
from spotspeed.checkpoint.tiers import NodePart
from spotspeed.core.chunks import join
from spotspeed.core.described import Described, lay_out
from spotspeed.core.manifest import Manifest, encode_manifest
from spotspeed.core.saver_protocol import (
    Abandon,
    Begin,
    Bypassed,
    Chunks,
    Cost,
    Decoder,
    Describe,
    Drain,
    End,
    Failed,
    Freed,
    Hello,
    Kept,
    LostPart,
    Message,
    Need,
    Notify,
    Renew,
    Sealed,
    Stored,
    UseTier,
    encode,
)
from spotspeed.errors import FormatError, SpotSpeedError, StorageError
from spotspeed.storage.contract import Storage

RECV_BYTES = 1 << 18
SEND_TIMEOUT_S = 30
"""A rank that reads nothing for so long gets no more answers; its saves are stored all the same."""
_logger = logging.getLogger("spotspeed")


class House(Protocol):
    """What a session asks of the server that it belongs to."""

    @property
    def storage(self) -> Storage: ...

    @property
    def sealer(self) -> Sealer: ...

    @property
    def chooser(self) -> Chooser: ...

    @property
    def encoders(self) -> ThreadPoolExecutor: ...

    @property
    def urgent_encoders(self) -> ThreadPoolExecutor:
        """Threads of normal priority, for the save of a notice."""
        ...

    def began(self, save: SaveProgress) -> None:
        """A save has begun to arrive."""

    def tier(self, local_path: str) -> NodeTier:
        """The tier of this node below `local_path`, the same for all sessions."""

    def drain(self, before_epoch: int, session: Session) -> None:
        """Answer `session` until the saves of older epochs are settled."""

    def notify(self, message: Notify) -> None:
        """Tell all sessions."""


class Session:
    """A connection to one rank (or observer) and everything that it has staged.

    `is_over` when the rank is gone and nothing of it is left to store.
    """

    def __init__(
        self, sock: socket.socket, peer_pid: int, hello: Hello, arena: SlotArena | None
    ) -> None:
        self.hello = hello
        self._peer_pid = peer_pid
        self.arena = arena
        self.is_connected = True
        self._socket = sock
        self._socket.settimeout(None)
        self._socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT_S, 0)
        )
        self._is_deaf = False
        self._renewal: Renewal | None = None
        self._tier: NodeTier | None = None
        self._send_lock = threading.Lock()
        self._ledger = SlotLedger(arena.slot_count if arena else 0, self._free)
        self._saves: dict[int, IncomingSave] = {}
        self._last_number = 0
        self._described: tuple[int, Described] | None = None
        self._queue: queue.SimpleQueue[IncomingSave | None] = queue.SimpleQueue()
        self._urgent: queue.SimpleQueue[IncomingSave | None] = queue.SimpleQueue()

    def __str__(self) -> str:
        return f"rank {self.hello.rank} (process {self.hello.pid})"

    def send(self, message: Message) -> bool:
        """Send if the rank still listens, and whether it does; what it sent is read in any case."""
        frame = encode(message)
        with self._send_lock:
            if not self._is_deaf:
                try:
                    self._socket.sendall(frame)
                except OSError as error:
                    self._is_deaf = True
                    _logger.info("%s takes no more answers: %s", self, error)
            return not self._is_deaf

    def serve(self, house: House, decoder: Decoder) -> None:
        """Read until the rank is gone, and return when everything it staged has been stored."""
        writers = [threading.Thread(target=self._write, args=(house, is_urgent), name="writer",
                                    daemon=True) for is_urgent in (False, True)]  # fmt: skip
        for writer in writers:
            writer.start()
        reason = "its rank left before everything was staged"
        try:
            for data in _received(self._socket, self._peer_pid):
                for message in decoder.feed(data):
                    self._handle(message, house)
        except Exception as error:
            # Whatever it was, what is staged completely is still to be stored.
            _logger.exception("%s ends", self)
            reason = f"its session with the saver ended: {error!r}"
        self.is_connected = False
        for save in list(self._saves.values()):
            if not save.is_staged:
                save.stop(reason)
        if self._renewal is not None:
            self._renewal.drain()
        for queued, writer in zip((self._queue, self._urgent), writers, strict=True):
            queued.put(None)
            writer.join()
        if self._renewal is not None:
            self._renewal.stop()
        with self._send_lock:
            self._is_deaf = True
        self._socket.close()

    def _handle(self, message: Message, house: House) -> None:
        match message:
            case Describe(number, chunk_bytes, fragments):
                self._described = number, Described.of(fragments, chunk_bytes=chunk_bytes)
            case Begin():
                self._begin(message, house)
            case Chunks(number, first, slots):
                self._ledger.take(number, slots)
                save = self._saves.get(number)
                if save is None or save.progress.state != "arriving":
                    self._check_known(number)
                    self._ledger.settle(number)
                else:
                    save.add(first, slots)
            case End(number):
                self._check_known(number)
                if (save := self._saves.get(number)) and save.progress.state == "arriving":
                    save.end()
            case Abandon(number, reason):
                self._check_known(number)
                if save := self._saves.get(number):
                    save.stop(reason)
            case LostPart(directory, rank, reason):
                house.sealer.broken(directory, rank, f"rank {rank} failed: {reason}")
            case Need(count):
                self._ledger.need(count)
            case Drain(before_epoch):
                house.drain(before_epoch, self)
            case Renew(epoch, period_s):
                if self._renewal is None or self._renewal.epoch != epoch:
                    if self._renewal is not None:
                        self._renewal.stop()
                    self._renewal = Renewal(house.storage, epoch, period_s)
            case UseTier(local_path):
                self._tier = house.tier(local_path)
            case Notify():
                house.notify(message)
            case _:
                raise FormatError(f"a rank does not send {type(message).__name__}")

    def _check_known(self, number: int) -> None:
        if not 0 < number <= self._last_number:
            raise FormatError(f"save {number} was never begun")

    def _begin(self, begin: Begin, house: House) -> None:
        if self.arena is None or begin.chunk_bytes > self.arena.slot_bytes:
            raise FormatError(f"save {begin.save}: no arena with slots of {begin.chunk_bytes}")
        if begin.save <= self._last_number:
            raise FormatError(f"save {begin.save} begun after {self._last_number}")
        described = self._described if begin.described else None
        if begin.described and (
            described is None
            or (described[0], described[1].chunk_bytes) != (begin.described, begin.chunk_bytes)
        ):
            raise FormatError(f"save {begin.save}: refers to description {begin.described}")
        common = described[1] if described else Described.of((), chunk_bytes=begin.chunk_bytes)
        counts = [item.fragment_count for item in begin.objects]
        parts = lay_out(common, begin.fragments, counts)
        layout = join(parts, counts)
        if (len(layout.chunks), layout.raw_bytes) != (begin.chunk_count, begin.raw_bytes):
            raise FormatError(
                f"save {begin.save}: {begin.chunk_count} chunks and {begin.raw_bytes} bytes "
                f"announced, the layout has {len(layout.chunks)} and {layout.raw_bytes}"
            )
        self._last_number = begin.save
        save = IncomingSave(begin, layout, parts)
        for older in list(self._saves.values()):
            older.overtake()
        self._saves[save.number] = save
        if save.is_urgent:
            weigh_session(0)
        house.began(save.progress)
        house.sealer.mended(save.ticket.directory, save.rank)
        (self._urgent if save.is_urgent else self._queue).put(save)

    def _write(self, house: House, is_urgent: bool) -> None:
        """Body of a writer thread: store the saves in the order in which they began.

        That of a notice has a thread of its own, of normal priority: it overtakes the others.
        """
        if not is_urgent:
            lower_priority()
        encoders = house.urgent_encoders if is_urgent else house.encoders
        while (save := (self._urgent if is_urgent else self._queue).get()) is not None:
            assert self.arena is not None
            workshop = Workshop(
                house.storage, self.arena, self._ledger, encoders,
                self._retry_s, house.chooser, self._tier, self._bypassed,
            )  # fmt: skip
            try:
                part = store(save, workshop)
            except SpotSpeedError as error:
                self._fail(save, error, house)
                continue
            except Exception as error:
                # The saves behind this one still need this thread.
                _logger.exception("%s failed", save)
                self._fail(save, StorageError(f"{save}: the saver failed: {error!r}"), house)
                continue
            finally:
                self._ledger.settle(save.number)
            if save.cost is not None:
                self.send(save.cost)
            if part is None or self._tier is None:
                self._stored(save, house)
            else:
                save.progress.keep(part.size_bytes)
                self.send(Kept(save.number, part.size_bytes))
                self._tier.drain(part, save, partial(self._drained, save, part, house))

    def _retry_s(self, save: IncomingSave) -> float:
        """How long the store may fail for `save` from now on."""
        is_awaited = save.ticket.reason != "periodic" or save.is_overtaken
        return RETRY_S if is_awaited and self.is_connected else LONG_RETRY_S

    def _drained(
        self, save: IncomingSave, part: NodePart, house: House, error: SpotSpeedError | None
    ) -> None:
        """What the node's disk held has come to the store, or will not."""
        if error is None:
            shard, drained_s = part.receipt.shard, save.progress.drained_s
            self.send(Cost(save.number, False, shard.raw_bytes, shard.size_bytes, 0.0, drained_s))
            self._stored(save, house)
        else:
            self._fail(save, error, house, is_final=is_final(error))

    def _stored(self, save: IncomingSave, house: House) -> None:
        """This rank's part is durable at the store; the others' may be."""
        save.progress.state = "written"
        self.send(Stored(save.number, save.objects or ()))
        settle = partial(self._judged, storage=house.storage)
        house.sealer.add(save, settle, is_wanted=lambda: self.is_connected,
                         is_ordered=self._tier is None)  # fmt: skip

    def _judged(
        self, save: IncomingSave, outcome: Manifest | SpotSpeedError, storage: Storage
    ) -> None:
        """What became of a save whose own part is durable."""
        if isinstance(outcome, HopelessError):
            outcome = _take_back(save, outcome, storage)
        self._settled(save, outcome)

    def _bypassed(self, save: IncomingSave, cause: str) -> None:
        self.send(Bypassed(save.number, cause))

    def _fail(
        self, save: IncomingSave, error: SpotSpeedError, house: House, *, is_final: bool = True
    ) -> None:
        """This rank's part will not be at the store; unless `is_final`, a later saver brings it."""
        _logger.log(
            logging.INFO if isinstance(error, StoppedError) else logging.ERROR,
            "%s failed: %s", save, error,
        )  # fmt: skip
        outcome: Manifest | SpotSpeedError = error
        if is_final and save.is_promised:
            outcome = _take_back(save, error, house.storage)
        if not isinstance(outcome, Manifest):
            why = f"rank {save.rank} failed: {error}"
            house.sealer.broken(save.ticket.directory, save.rank, why, is_final=is_final)
        self._settled(save, outcome)

    def _settled(self, save: IncomingSave, outcome: Manifest | SpotSpeedError) -> None:
        """Report the end of a save."""
        if isinstance(outcome, Manifest):
            save.progress.state = "sealed"
            if self._tier is not None:
                self._tier.sealed(outcome)
            self.send(Sealed(save.number, encode_manifest(outcome)))
        else:
            save.progress.state = "failed"
            self.send(Failed(save.number, str(outcome)))
        self._saves.pop(save.number, None)

    def _free(self, slots: Sequence[int]) -> None:
        self.send(Freed(tuple(slots)))


def _take_back(
    save: IncomingSave, error: SpotSpeedError, storage: Storage
) -> Manifest | SpotSpeedError:
    """Give the space of a lost save back; what it has come to: `error`, or sealed after all.

    That of a notice keeps what it has: it is tried again, and no time is left to write it twice.
    """
    if save.is_urgent:
        return error
    try:
        return take_back(storage, save.ticket, save.rank) or error
    except SpotSpeedError as obstacle:
        _logger.warning("%s: what is there of it stays for now: %s", save, obstacle)
        return error


def _received(sock: socket.socket, pid: int) -> Iterator[bytes]:
    """What the rank has sent, until it hangs up or its process is gone.

    A process forked from the rank (a DataLoader worker) may keep the socket open after the rank
    has died, so the rank's process is watched, too; what it had sent is read to the end first.
    A rank in another process namespace (`pid` 0) cannot be watched.
    """
    process, is_gone = -1, False
    try:
        process = os.pidfd_open(pid) if pid > 0 else -1
    except ProcessLookupError:
        is_gone = True
    except OSError as error:
        _logger.info("process %d cannot be watched: %s", pid, error)
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    if process >= 0:
        poller.register(process, select.POLLIN)
    try:
        while True:
            is_gone = is_gone or process in {descriptor for descriptor, _ in poller.poll()}
            try:
                data = sock.recv(RECV_BYTES, socket.MSG_DONTWAIT if is_gone else 0)
            except OSError:
                return
            if not data:
                return
            yield data
    finally:
        if process >= 0:
            os.close(process)
