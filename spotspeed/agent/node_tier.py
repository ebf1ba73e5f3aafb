"""The saver's use of the node's own disk: room for new parts, what was left there, what may go."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from spotspeed.agent.draining import Drain, Drainer, SupersededError, is_final
from spotspeed.agent.incoming import IncomingSave, SaveProgress, StoppedError
from spotspeed.agent.sealing import Sealer
from spotspeed.checkpoint.shard import largest_file_bytes
from spotspeed.checkpoint.tiers import NodeDirectory, NodePart, mark_sealed, open_node, survey
from spotspeed.core.lineage import Place, place_of
from spotspeed.core.manifest import Manifest, Ticket
from spotspeed.core.tiers import Cached, plan_eviction
from spotspeed.errors import SpotSpeedError, StorageError
from spotspeed.storage.contract import Storage
from spotspeed.storage.failures import storage_error
from spotspeed.storage.local import LocalStorage
from spotspeed.storage.local_writer import LocalWriter
from spotspeed.storage.posix import read_exact

SPARE_BYTES = 16 * 1024 * 1024
"""What is left free on the disk for others and for the file system's own needs."""
CLOSE_TIMEOUT_S = 10.0
LOCK_FILE = "lock"
_logger = logging.getLogger("spotspeed")


class House(Protocol):
    """What the tier asks of the server."""

    @property
    def storage(self) -> Storage: ...

    @property
    def sealer(self) -> Sealer: ...

    def began(self, save: SaveProgress) -> None:
        """A save is this server's to finish."""


@dataclass(slots=True)
class Leftover:
    """A part that another saver left on the disk."""

    ticket: Ticket
    rank: int
    progress: SaveProgress
    stopped: StoppedError | None = None

    def __str__(self) -> str:
        return f"{self.ticket.directory}, rank {self.rank}, left by an earlier saver"

    def pause(self, seconds: float) -> None:
        threading.Event().wait(seconds)


class NodeSink:
    """Where one part is written in the tier, and from where it can be moved elsewhere.

    A context manager; the room reserved for the part is given back at its end.
    """

    def __init__(
        self, node: LocalStorage, ticket: Ticket, on_end: Callable[[NodeSink], None]
    ) -> None:
        self._node, self._ticket = node, ticket
        self._on_end = on_end
        self._file = -1
        self.is_kept = False
        """Whether the part is complete here, and next to be given to `NodeTier.drain`."""

    def writer(self, key: str) -> LocalWriter:
        writer = self._node.writer(key)
        try:
            self._file = writer.reader()
        except StorageError:
            writer.abort()
            raise
        return writer

    def put(self, key: str, data: bytes) -> None:
        self._node.put(key, data)

    def read_back(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from what the writer has taken; the file itself may be gone by then."""
        try:
            count = read_exact(self._file, buffer, offset)
        except OSError as error:
            raise storage_error("read back", self._node.url, error) from error
        if count != len(buffer):
            raise StorageError(f"{self._node.url}: {count} of {len(buffer)} bytes at {offset} are "
                               f"left of {self._ticket.directory}")  # fmt: skip

    def discard(self, rank: int) -> None:
        """Remove what the disk took of a part that went elsewhere."""
        with contextlib.suppress(StorageError):
            self._node.delete(self._ticket.receipt_path(rank))
            self._node.delete(self._ticket.shard_path(rank))

    def __enter__(self) -> NodeSink:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._on_end(self)


class NodeTier:
    """The tier of this node below `local_path` for the server's store; any thread may use it.

    Opened when first needed, and again as long as that fails: another saver may hold it.
    """

    def __init__(self, local_path: str, house: House) -> None:
        self.node = open_node(local_path, house.storage.url)
        self._house = house
        self._drainer = Drainer(self.node, house.storage)
        self._lock = threading.Lock()
        self._lock_file = -1
        self._reserved_bytes = 0
        self._pending: Counter[str] = Counter()
        self._held: dict[str, Place] = {}
        self._newest: Place | None = None
        self._sealed: queue.SimpleQueue[Manifest | None] = queue.SimpleQueue()
        self._janitor = threading.Thread(target=self._tidy, name="node-tier", daemon=True)
        self._janitor.start()

    def __str__(self) -> str:
        return self.node.url

    @property
    def bytes_per_s(self) -> float | None:
        """How fast the store has taken what was drained; None when that is not known."""
        return self._drainer.bytes_per_s

    def open(self) -> None:
        """Take the tier over, and begin to drain what earlier savers left.

        Raises StorageError when it cannot be used now; harmless when it is open.
        """
        with self._lock:
            if self._lock_file >= 0:
                return
            self._lock_file = _lock(self.node.url)
            # Whoever writes here holds the lock.
            for leftover in self.node.leftovers():
                self.node.discard(leftover)
            found = survey(self.node)
            leftovers = [part for directory in found for part in self._take(directory)]
        for part in leftovers:
            self._recover(part)

    def sink(self, save: IncomingSave) -> NodeSink:
        """Room for a part; raises StorageError when the disk has none or cannot be used."""
        self.open()
        ticket, need = save.ticket, largest_file_bytes(save.layout)
        with self._lock:
            free = _free_bytes(self.node.url) - self._reserved_bytes - SPARE_BYTES
            if need > free:
                raise StorageError(
                    f"{self.node.url}: {need} bytes are needed and {max(0, free)} free beside what "
                    f"has been promised; {len(self._held)} checkpoints are held there"
                )
            self._reserved_bytes += need
            self._pending[ticket.directory] += 1
            self._held[ticket.directory] = Place(ticket.epoch, ticket.step)

        def end(sink: NodeSink) -> None:
            with self._lock:
                self._reserved_bytes -= need
                if not sink.is_kept:
                    self._settle(ticket.directory)

        return NodeSink(self.node, ticket, end)

    def drain(
        self, part: NodePart, save: IncomingSave, on_done: Callable[[SpotSpeedError | None], None]
    ) -> None:
        """Bring a part that `store` has kept here to the store, in the background."""
        self._begin(Drain(part, save, on_done))

    def sealed(self, manifest: Manifest) -> None:
        """A checkpoint is durable at the store: older ones may go from here. Returns at once."""
        self._sealed.put(manifest)

    def close(self) -> None:
        """Finish tidying, within reason."""
        self._sealed.put(None)
        self._janitor.join(CLOSE_TIMEOUT_S)

    def _begin(self, drain: Drain) -> None:
        """Drain a part that counts as pending; what the store did not take stays so."""
        on_done = drain.on_done

        def done(error: SpotSpeedError | None) -> None:
            is_useless = error is not None and is_final(error)
            if is_useless:
                self._drop(drain.part)
            if error is None or is_useless:
                with self._lock:
                    self._settle(drain.part.ticket.directory)
            on_done(error)

        drain.on_done = done
        self._drainer.add(drain)

    def _settle(self, directory: str) -> None:
        """One thing less is to be done for `directory`; called under the lock."""
        self._pending[directory] -= 1
        if self._pending[directory] <= 0:
            del self._pending[directory]

    def _take(self, found: NodeDirectory) -> list[NodePart]:
        """Note what is there; returns the parts that may still have to be drained."""
        at = place_of(found.directory)
        assert at is not None
        for cause in found.causes:
            _logger.error("%s: left by an earlier saver and damaged: %s", found.directory, cause)
        if not found.parts and not found.is_sealed:
            # Its saver died before a receipt was there: it is in nobody's memory any more.
            self.node.delete_prefix(found.directory)
            return []
        self._held[found.directory] = at
        if found.is_sealed:
            self._newest = max(at, self._newest or at)
            return []
        return list(found.parts)

    def _recover(self, part: NodePart) -> None:
        progress = SaveProgress(part.ticket.epoch, part.ticket.directory, part.size_bytes)
        progress.state = "kept"
        save = Leftover(part.ticket, part.rank, progress)
        self._house.began(progress)
        with self._lock:
            self._pending[part.ticket.directory] += 1

        def sealed(_: object, outcome: Manifest | SpotSpeedError) -> None:
            if isinstance(outcome, Manifest):
                progress.state = "sealed"
                self.sealed(outcome)
            else:
                _logger.error("%s: %s", save, outcome)
                progress.state = "failed"

        def drained(error: SpotSpeedError | None) -> None:
            if error is None:
                progress.state = "written"
                self._house.sealer.add(save, sealed, is_wanted=lambda: False)
            else:
                is_loss = not isinstance(error, SupersededError)
                _logger.log(logging.ERROR if is_loss else logging.INFO, "%s: %s", save, error)
                progress.state = "failed" if is_loss else "stored"

        self._begin(Drain(part, save, drained, is_leftover=True))

    def _drop(self, part: NodePart) -> None:
        """Remove a part that nobody wants or can use."""
        try:
            self.node.delete(part.ticket.receipt_path(part.rank))
            self.node.delete(part.ticket.shard_path(part.rank))
        except StorageError as error:
            _logger.warning("%s: %s", part.ticket.directory, error)

    def _tidy(self) -> None:
        """Body of the janitor: mark what is sealed, and remove what that makes old."""
        while (manifest := self._sealed.get()) is not None:
            ticket = manifest.ticket
            at = Place(ticket.epoch, ticket.step)
            with self._lock:
                is_held = ticket.directory in self._held
                self._newest = max(at, self._newest or at)
                cached = [Cached(name, place, self._pending[name] > 0)
                          for name, place in self._held.items()]  # fmt: skip
                gone = plan_eviction(cached, self._newest)
                for name in gone:
                    del self._held[name]
            try:
                if is_held and ticket.directory not in gone:
                    mark_sealed(self.node, ticket.directory, manifest.digest)
                for name in gone:
                    self.node.delete_prefix(name)
            except StorageError as error:
                _logger.warning("%s could not be tidied: %s", self, error)


def _lock(root: str) -> int:
    """The tier's lock, which goes with this process; StorageError when another process has it."""
    path = os.path.join(root, LOCK_FILE)
    file = -1
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if file >= 0:
            os.close(file)
        if isinstance(error, BlockingIOError):
            raise StorageError(f"{root} is in use by another saver: {path} is locked") from None
        raise storage_error("lock", path, error) from error
    return file


def _free_bytes(root: str) -> int:
    try:
        status = os.statvfs(root)
    except OSError as error:
        raise storage_error("look at", root, error) from error
    return status.f_bavail * status.f_frsize
