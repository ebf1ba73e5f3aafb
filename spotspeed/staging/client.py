"""A rank's connection to the saver process of its node, and the arena that the saver lends it."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from spotspeed.core.frozen import ObjectRecord
from spotspeed.core.manifest import Manifest, decode_manifest
from spotspeed.core.saver_protocol import (
    Bypassed,
    Cost,
    Drain,
    Drained,
    Failed,
    Freed,
    Hello,
    Kept,
    Message,
    Noticed,
    Notify,
    Progress,
    Renew,
    Sealed,
    Stored,
    UseTier,
    encode,
)
from spotspeed.errors import FormatError, SpotSpeedError, StorageError
from spotspeed.events import Lost, emit
from spotspeed.staging.announcing import Announcer
from spotspeed.staging.connect import (
    RECV_BYTES,
    Connection,
    Leaving,
    LentArena,
    await_end,
    connect,
    greet,
)
from spotspeed.staging.launch import rendezvous_url, saver_address, start_saver
from spotspeed.staging.outbox import OnSent, Outbox
from spotspeed.staging.pool import SlotPool

CONNECT_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 5.0
OnNotice = Callable[[float, str], None]
"""Called with (deadline_s, source) on the session's reader thread."""


class SaveListener(Protocol):
    """Hears what becomes of one save; called on the session's reader thread, must not block."""

    def kept(self, size_bytes: int) -> None:
        """This rank's shard and receipt are durable on the node's own disk."""

    def cost(self, cost: Cost) -> None:
        """What it took to make this rank's shard durable, there or at the store."""

    def bypassed(self, cause: str) -> None:
        """The node's own disk does not take them; they go straight to the store."""

    def stored(self, objects: tuple[ObjectRecord, ...]) -> None:
        """This rank's shard and receipt are durable at the store, with these frozen objects."""

    def sealed(self, manifest: Manifest, stored_form: bytes) -> None:
        """The checkpoint is sealed; the last call."""

    def failed(self, error: SpotSpeedError) -> None:
        """The save failed; the last call."""


OnLoss = Callable[[Sequence[SaveListener]], None]


class SaverSession:
    """An open session with a saver; methods may be called from any thread.

    The arena stays mapped as long as this object lives, even when the saver is gone.
    """

    def __init__(self, connection: Connection, *, on_notice: OnNotice | None = None) -> None:
        self.saver_pid = connection.welcome.pid
        self.slot_bytes = connection.welcome.slot_bytes
        self.arena_bytes = connection.welcome.arena_bytes
        self.pool = SlotPool(self.arena_bytes // self.slot_bytes if self.slot_bytes else 0)
        self.arena = LentArena(connection)
        self.announcer = Announcer(self.send, self.slot_bytes)
        self._socket = connection.socket
        self._decoder = connection.decoder
        self._on_notice = on_notice
        self._listeners: dict[int, SaveListener] = {}
        self._drains: queue.SimpleQueue[Progress | Drained | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._outbox = Outbox(connection.socket, self._give_up)
        self._error: SpotSpeedError | None = None
        self._is_closing = False
        self._when_lost: OnLoss | None = None
        self._loss = "what it had not sealed is lost, and the next save starts a new one"
        self._reader = threading.Thread(target=self._read, name="spotspeed-saver", daemon=True)
        self._reader.start()

    @property
    def is_alive(self) -> bool:
        """Whether the saver is still there."""
        return self._error is None

    def when_lost(self, callback: OnLoss) -> None:
        """Have `callback` called when the saver is gone, unless this session is closed before.

        It gets those whose saves have failed by that.
        """
        with self._lock:
            self._when_lost = callback
            is_lost = self._error is not None and not self._is_closing
        if is_lost:
            callback(())

    def slot_address(self, slot: int) -> int:
        """Where slot `slot` begins in this process's memory."""
        return self.arena.address + slot * self.slot_bytes

    def listen(self, save: int, listener: SaveListener) -> None:
        """Tell `listener` what becomes of save `save`; raises StorageError if the saver is gone."""
        with self._lock:
            if self._error is not None:
                raise self._error
            self._listeners[save] = listener

    def send(self, message: Message, on_sent: OnSent | None = None) -> None:
        """Send `message` behind those before it, at once or as soon as the saver reads.

        `on_sent` is called, on some thread, when the kernel has it: from then on the saver gets it
        even if this rank dies. Raises StorageError when the saver is gone.
        """
        frame = encode(message)
        if self._error is not None:
            raise self._error
        try:
            self._outbox.send(frame, on_sent)
        except OSError as error:
            raise self._lose(error) from error

    def drain(
        self,
        before_epoch: int,
        *,
        timeout_s: float,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Drained:
        """Wait until every save of an epoch below `before_epoch` is durable here or has failed.

        `on_progress(saves_left, bytes_left)` is called about twice a second. One drain at a time.
        Raises StorageError when the saver dies or `timeout_s` pass; the saver goes on writing.
        """
        deadline = time.monotonic() + timeout_s
        self.send(Drain(before_epoch))
        left = "an unknown number of"
        while (remaining_s := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                answer = self._drains.get(timeout=min(remaining_s, 5.0))
                if isinstance(answer, Drained):
                    return answer
                if answer is None:
                    raise self._error or StorageError("the session with the saver was closed")
                left = f"{answer.saves_left} saves with {answer.bytes_left}"
                if on_progress is not None:
                    on_progress(answer.saves_left, answer.bytes_left)
        raise StorageError(
            f"saver process {self.saver_pid} still has {left} bytes to write after {timeout_s} s"
        )

    def renew_owner(self, epoch: int, *, period_s: float) -> None:
        """Let the saver renew the owner record of `epoch` while this rank or its saves live."""
        self.send(Renew(epoch, period_s))

    def use_tier(self, local_path: str) -> None:
        """Have this session's saves written to the node's disk below `local_path` first.

        What earlier savers left there is drained from now on, and waited for by `drain`.
        """
        self._loss = "what was not on this node's disk is lost, and the next saver drains the rest"
        self.send(UseTier(local_path))

    def notify(self, deadline_s: float, source: str) -> None:
        """Tell all ranks of this node that the machine goes away."""
        self.send(Notify(deadline_s, source))

    def close(self, *, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Leave; saves that were staged completely are finished by the saver. Idempotent.

        Waits up to `timeout_s` for their outcome; listeners that then wait still are failed.
        """
        self._is_closing = True
        deadline = time.monotonic() + timeout_s
        self._outbox.flush(timeout_s)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._reader.join(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._socket.close()

    def _read(self) -> None:
        try:
            while data := self._socket.recv(RECV_BYTES):
                for message in self._decoder.feed(data):
                    self._handle(message)
            self._lose(None)
        except (OSError, SpotSpeedError, ValueError) as error:
            self._lose(error)

    def _handle(self, message: Message) -> None:
        match message:
            case Freed(slots):
                self.pool.release(slots)
            case Kept(save, size_bytes):
                if listener := self._listeners.get(save):
                    listener.kept(size_bytes)
            case Bypassed(save, cause):
                if listener := self._listeners.get(save):
                    listener.bypassed(cause)
            case Cost(save):
                if listener := self._listeners.get(save):
                    listener.cost(message)
            case Stored(save, objects):
                if listener := self._listeners.get(save):
                    listener.stored(objects)
            case Sealed(save, manifest):
                if listener := self._listeners.pop(save, None):
                    parsed = decode_manifest(manifest, source="the saver's manifest")
                    listener.sealed(parsed, manifest)
            case Failed(save, reason):
                if listener := self._listeners.pop(save, None):
                    listener.failed(StorageError(reason))
            case Progress() | Drained():
                self._drains.put(message)
            case Noticed(deadline_s, source):
                if self._on_notice is not None:
                    self._on_notice(deadline_s, source)
            case _:
                raise FormatError(f"saver socket: a saver does not send {type(message).__name__}")

    def _give_up(self, cause: OSError) -> None:
        """The saver takes nothing more: it is to be no saver of this rank any longer."""
        self._lose(cause)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _lose(self, cause: Exception | None) -> SpotSpeedError:
        """Settle everything that waits for the saver; returns the error to raise."""
        with self._lock:
            if self._error is None:
                why = f": {cause}" if cause else ""
                self._error = StorageError(
                    f"saver process {self.saver_pid} died before it had finished{why}; {self._loss}"
                    if not self._is_closing
                    else "the session with the saver was closed"
                )
                is_news = not self._is_closing
            else:
                is_news = False
            error, listeners = self._error, list(self._listeners.values())
            callback = self._when_lost if is_news else None
            self._listeners.clear()
        if is_news:
            emit(Lost(f"saver process {self.saver_pid}", str(error)))
        self.pool.fail(error)
        self._drains.put(None)
        for listener in listeners:
            listener.failed(error)
        if callback is not None:
            callback(listeners)
        return error


def open_session(
    url: str,
    *,
    rank: int,
    arena_bytes: int,
    slot_bytes: int,
    on_notice: OnNotice | None = None,
    timeout_s: float = CONNECT_TIMEOUT_S,
) -> SaverSession:
    """A session with the saver of this node for `url`, which is started if there is none.

    Raises StorageError when no saver could be reached or started within `timeout_s` (one of
    another version first finishes its work), PoolExhaustedError when the node has no memory for
    the arena.
    """
    deadline = time.monotonic() + timeout_s
    canonical, name = rendezvous_url(url), saver_address(url)
    hello = Hello(rank, os.getpid(), arena_bytes, slot_bytes)
    pause_s, obstacle = 0.005, "nobody listens"
    while time.monotonic() < deadline:
        sock = connect(name)
        if sock is None:
            start_saver(canonical, name)
            sock = connect(name)
        if sock is not None:
            try:
                connection = greet(sock, name, hello)
                return SaverSession(connection, on_notice=on_notice)
            except Leaving as leaving:
                obstacle = str(leaving)
                await_end(sock, deadline)
            except OSError as error:
                obstacle = f"it hung up: {error}"
                sock.close()
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, 0.2)
    raise StorageError(f"no saver for {canonical} within {timeout_s} s: {obstacle}")


def find_saver(url: str, *, on_notice: OnNotice | None = None) -> SaverSession | None:
    """A session without an arena with the saver for `url`, or None when none is running."""
    name = saver_address(url)
    sock = connect(name)
    if sock is None:
        return None
    try:
        return SaverSession(greet(sock, name, Hello(0, os.getpid(), 0, 0)), on_notice=on_notice)
    except OSError as error:
        sock.close()
        raise StorageError(f"the saver at {name!r} hung up: {error}") from error
