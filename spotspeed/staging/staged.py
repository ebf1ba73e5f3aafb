"""One save on its way from the training's memory to the saver: chunks, slots, futures."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from spotspeed.core.chunks import StreamLayout, join, pack_parts
from spotspeed.core.deadline import Orders
from spotspeed.core.frozen import ObjectRecord
from spotspeed.core.layout import Fragment
from spotspeed.core.manifest import Manifest, Ticket
from spotspeed.core.saver_fields import NewObject
from spotspeed.core.saver_protocol import Abandon, Begin, Chunks, Cost, End, Need
from spotspeed.core.tiers import Level
from spotspeed.errors import CaptureError, SpotSpeedError, StorageError
from spotspeed.events import Bypassed, Kept, Sealed, Staged, Stalled, emit
from spotspeed.staging.check import Window
from spotspeed.staging.client import SaverSession
from spotspeed.staging.frozen import FrozenShare
from spotspeed.staging.native import CopyEngine, CopyHandle
from spotspeed.staging.sources import CopyPlan, Source

BATCH_BYTES = 16 * 1024 * 1024
"""Chunks are claimed, copied and handed to the saver in batches of about this size."""
_STALL_MIN_S = 0.001
NOTHING_FROZEN = FrozenShare()


@dataclass(frozen=True, slots=True)
class StagingFacts:
    """What staging one save took; `stalled_s` of `elapsed_s` were spent waiting for free slots."""

    size_bytes: int
    elapsed_s: float
    stalled_s: float


class StagedSave:
    """One rank's part of a save.

    `staging_completion`: the state is out of the training's memory and in the saver's hands, and
    the tensors may change; a SIGKILL of this rank loses nothing any more. `stored_completion`:
    this rank's shard and receipt are durable. `upload_completion`: the checkpoint is sealed at the
    store; resolves to the manifest. All raise StorageError (disk full, saver died, abandoned) or
    CaptureError; training can go on in every case.
    """

    def __init__(
        self,
        ticket: Ticket,
        rank: int,
        *,
        contents: tuple[Sequence[Fragment], Sequence[Source]],
        frozen: FrozenShare = NOTHING_FROZEN,
        window: Window,
        settings: CopySettings,
    ) -> None:
        self.ticket = ticket
        self.rank = rank
        self._frozen = frozen
        self._objects: tuple[ObjectRecord, ...] = ()
        new = frozen.new
        self._fragments = [*(item for group in new for item in group.fragments), *contents[0]]
        self._sources: Sequence[Source] = [
            *(item for group in new for item in group.sources), *contents[1]
        ]  # fmt: skip
        self.size_bytes = sum(source.size_bytes for source in self._sources)
        self.staging_completion: Future[StagingFacts] = Future()
        self.stored_completion: Future[None] = Future()
        self.upload_completion: Future[Manifest] = Future()
        self.manifest_bytes: bytes | None = None
        self.costs: tuple[Cost, ...] = ()
        self._window: Window | None = window
        self._settings = settings
        self._began = time.monotonic()
        self._stalled_s = 0.0
        self._session: SaverSession | None = None
        self._layout: StreamLayout | None = None
        self._next = 0
        self._filled: dict[int, int] = {}
        self._sent = 0
        self._copying: list[CopyHandle] = []
        self._lock = threading.Lock()
        self._claim_lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._is_over = False
        self._is_kept = False
        for future in (self.staging_completion, self.stored_completion, self.upload_completion):
            future.set_running_or_notify_cancel()

    def wait_staged(self, timeout_s: float | None = None) -> bool:
        """Wait until the tensors may change; the calling thread helps to copy meanwhile.

        True when nothing will be copied any more, be it staged, failed or abandoned; False when
        `timeout_s` passed before.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._settings.help(self, deadline)
        remaining_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            self.staging_completion.exception(remaining_s)
        except TimeoutError:
            return False
        return True

    def verify_window(self) -> None:
        """Check that nothing changed while it was staged; call before the tensors may change.

        Raises CaptureError naming the fragments; then the save is abandoned, too.
        """
        window, self._window = self._window, None
        staging = self.staging_completion
        if window is None or not staging.done() or staging.exception() is not None:
            return
        try:
            window.verify()
        except CaptureError as error:
            self._end(error, tell=True)
            raise

    def abandon(self, reason: str) -> None:
        """Give this save up; what was written of it is removed. Harmless when it is sealed."""
        self._end(StorageError(f"{self.ticket.directory} was abandoned: {reason}"), tell=True)

    @property
    def staged_bytes(self) -> int:
        """Bytes that are in the saver's hands."""
        with self._lock:
            layout, sent = self._layout, self._sent
        if layout is None:
            return 0
        return min(self.size_bytes, sum(chunk.size_bytes for chunk in layout.chunks[:sent]))

    @property
    def level(self) -> Level | None:
        """How far this rank's part has come; "remote" when the checkpoint is sealed."""
        if _is_fine(self.upload_completion):
            return "remote"
        if self._is_kept:
            return "node"
        return "process" if _is_fine(self.staging_completion) else None

    def known_objects(self) -> dict[str, ObjectRecord]:
        """The frozen objects that this rank's next save may refer to, by content.

        Those of this save's receipt once that is durable; before, those that it refers to itself.
        None after a failure: an object may be what is missing.
        """
        with self._lock:
            is_stored = _is_fine(self.stored_completion)
            has_failed = self._is_over and not _is_fine(self.upload_completion)
            if has_failed and self.upload_completion.done():
                return {}
            objects = self._objects if is_stored else self._frozen.referred
        return {item.content: item for item in objects}

    @property
    def is_settled(self) -> bool:
        """Whether it is known how it ended."""
        return self.upload_completion.done()

    @property
    def is_over(self) -> bool:
        """Whether it is sealed, failed or abandoned."""
        return self._is_over

    def copy(self, deadline: float | None, *, is_urgent: bool) -> None:
        """Copy chunks until none is left, the save is over or `deadline` has passed.

        An urgent copier first helps those at work, which may be of low priority.
        """
        try:
            with self._lock:
                others = list(self._copying)
            for handle in others if is_urgent else ():
                handle.wait()
            while not self._is_over and self._copy_batch(deadline, is_urgent):
                pass
        except SpotSpeedError as error:
            self._end(error, tell=False)
        except Exception as error:
            wrapped = CaptureError(f"{self.ticket.directory}: copying failed: {error!r}")
            wrapped.__cause__ = error
            self._end(wrapped, tell=True)

    def kept(self, size_bytes: int) -> None:
        """The saver says: durable on this node."""
        self._is_kept = True
        elapsed_s = time.monotonic() - self._began
        emit(Kept(self.ticket.directory, self.rank, size_bytes, elapsed_s))

    def cost(self, cost: Cost) -> None:
        """The saver says: this is what it took."""
        self.costs = (*self.costs, cost)

    def bypassed(self, cause: str) -> None:
        """The saver says: straight to the store."""
        emit(Bypassed(self.ticket.directory, cause))

    def stored(self, objects: tuple[ObjectRecord, ...]) -> None:
        """The saver says: durable at the store."""
        with self._lock:
            self._objects = objects
            if not self._is_over and not self.stored_completion.done():
                self.stored_completion.set_result(None)

    def sealed(self, manifest: Manifest, stored_form: bytes) -> None:
        """The saver says: sealed."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        self.manifest_bytes = stored_form
        # On a busy machine the seal is heard before the thread that sent the end goes on.
        self._settle_staging(is_sealed=True)
        if not self.stored_completion.done():
            self.stored_completion.set_result(None)
        self.upload_completion.set_result(manifest)
        if self.rank == 0:
            ticket, elapsed_s = self.ticket, time.monotonic() - self._began
            emit(Sealed(ticket.directory, ticket.tag, ticket.step, manifest.data_bytes, elapsed_s))

    def failed(self, error: SpotSpeedError) -> None:
        """The saver says, or its death: failed."""
        self._end(error, tell=False)

    def _copy_batch(self, deadline: float | None, is_urgent: bool) -> bool:
        """Claim, copy and send some chunks; False when none is left or `deadline` has passed."""
        timeout_s = -1 if deadline is None else max(0.0, deadline - time.monotonic())
        if not self._claim_lock.acquire(timeout=timeout_s):
            return False
        try:
            session, layout = self._open()
            claimed = self._claim(session, layout, deadline)
        finally:
            self._claim_lock.release()
        if not claimed:
            return False
        plan = CopyPlan()
        for chunk, slot in claimed.items():
            plan.add(layout, self._sources, chunk, session.slot_address(slot))
        plan.run(self._settings.urgent if is_urgent else self._settings.lazy, self._begun)
        with self._lock:
            is_wanted = not self._is_over
            if is_wanted:
                self._filled |= claimed
        if not is_wanted:
            session.pool.release(claimed.values())
            return False
        self._send(session, layout, eager=session.pool.free_count == 0)
        return True

    def _claim(
        self, session: SaverSession, layout: StreamLayout, deadline: float | None
    ) -> dict[int, int]:
        """The next chunks and a slot for each; waits only for the first slot."""
        claimed: dict[int, int] = {}
        size = 0
        while self._next < len(layout.chunks) and size < BATCH_BYTES:
            slot = session.pool.acquire(timeout_s=0)
            if slot is None and not claimed:
                slot = self._wait_slot(session, layout, deadline)
            if slot is None:
                break
            claimed[self._next] = slot
            size += layout.chunks[self._next].size_bytes
            self._next += 1
        return claimed

    def _begun(self, handle: CopyHandle) -> None:
        with self._lock:
            self._copying = [other for other in self._copying if not other.done()] + [handle]

    def _open(self) -> tuple[SaverSession, StreamLayout]:
        """Announce the save; called under the claim lock."""
        if self._session is None or self._layout is None:
            session = self._settings.session()
            new = tuple(NewObject(group.content, len(group.fragments))
                        for group in self._frozen.new)  # fmt: skip
            counts = [item.fragment_count for item in new]
            parts = pack_parts(self._fragments, counts, chunk_bytes=session.slot_bytes)
            layout = join(parts, counts)
            number = self._settings.number()
            session.listen(number, self)
            self._number = number
            session.send(Begin(
                number, self.ticket, self.rank, session.slot_bytes, len(layout.chunks),
                layout.raw_bytes, self._settings.orders.compression, tuple(self._fragments),
                new, self._frozen.referred, self._settings.orders.is_direct,
            ))  # fmt: skip
            with self._lock:
                self._session, self._layout = session, layout
                is_wanted = not self._is_over
            if not is_wanted:
                session.send(Abandon(number, "abandoned before it began"))
            elif not layout.chunks:
                self._finish(session)
        return self._session, self._layout

    def _wait_slot(
        self, session: SaverSession, layout: StreamLayout, deadline: float | None
    ) -> int | None:
        """Send what is filled, and wait until the saver gives a slot back."""
        began = time.monotonic()
        self._send(session, layout, eager=True)
        session.send(Need(min(len(layout.chunks) - self._next, session.pool.slot_count)))
        timeout_s = None if deadline is None else max(0.0, deadline - began)
        slot = session.pool.acquire(give_up=lambda: self._is_over, timeout_s=timeout_s)
        self._stalled_s += time.monotonic() - began
        return slot

    def _send(self, session: SaverSession, layout: StreamLayout, *, eager: bool) -> None:
        """Hand over the filled chunks that follow those already sent."""
        with self._send_lock:
            with self._lock:
                if self._is_over:
                    return
                stop = self._sent
                while stop in self._filled:
                    stop += 1
                is_last = stop == len(layout.chunks)
                size = sum(layout.chunks[chunk].size_bytes for chunk in range(self._sent, stop))
                if stop == self._sent or not (eager or is_last or size >= BATCH_BYTES):
                    return
                first, self._sent = self._sent, stop
                slots = tuple(self._filled.pop(chunk) for chunk in range(first, stop))
            session.send(Chunks(self._number, first, slots))
            if is_last:
                self._finish(session)

    def _finish(self, session: SaverSession) -> None:
        """Everything is in the saver's hands."""
        session.send(End(self._number))
        self._settle_staging(is_sealed=False)

    def _settle_staging(self, *, is_sealed: bool) -> None:
        elapsed_s = time.monotonic() - self._began
        with self._lock:
            if self.staging_completion.done() or (self._is_over and not is_sealed):
                return
            facts = StagingFacts(self.size_bytes, elapsed_s, self._stalled_s)
            self.staging_completion.set_result(facts)
        self._sources = ()
        emit(Staged(self.ticket.directory, self.rank, self.size_bytes, elapsed_s))
        if self._stalled_s >= _STALL_MIN_S:
            cause = "the staging pool was full and the saver still writing"
            emit(Stalled(cause, self._stalled_s, self.ticket.step))

    def _end(self, error: SpotSpeedError, *, tell: bool) -> None:
        """Settle as failed; slots that the saver does not know of go back to the pool."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            slots, self._filled = list(self._filled.values()), {}
            session = self._session
        if session is not None:
            session.pool.release(slots)
            session.pool.wake()
            if tell:
                with contextlib.suppress(StorageError):
                    session.send(Abandon(self._number, str(error)))
        for future in (self.staging_completion, self.stored_completion, self.upload_completion):
            if not future.done():
                future.set_exception(error)


@dataclass(frozen=True, slots=True)
class CopySettings:
    """What a save needs of its stager."""

    session: Callable[[], SaverSession]
    number: Callable[[], int]
    help: Callable[[StagedSave, float | None], None]
    lazy: CopyEngine
    urgent: CopyEngine
    orders: Orders


def _is_fine(future: Future[Any]) -> bool:
    return future.done() and future.exception() is None
