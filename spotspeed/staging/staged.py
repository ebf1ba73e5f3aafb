"""One save on its way from the training's memory to the saver: copiers, checks, futures."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any, TypeVar

from spotspeed.core.deadline import Orders
from spotspeed.core.frozen import ObjectRecord
from spotspeed.core.layout import Fragment
from spotspeed.core.manifest import Manifest, Ticket
from spotspeed.core.saver_fields import NewObject
from spotspeed.core.saver_protocol import Abandon, Begin, Cost, End
from spotspeed.core.tiers import Level
from spotspeed.errors import CaptureError, SpotSpeedError, StorageError
from spotspeed.events import Bypassed, Kept, Sealed, Staged, Stalled, emit
from spotspeed.staging.check import Window
from spotspeed.staging.client import SaverSession
from spotspeed.staging.copy_plan import CopyPlan, Origin
from spotspeed.staging.flow import ChunkFlow
from spotspeed.staging.frozen import FrozenShare
from spotspeed.staging.native import CopyEngine, CopyHandle
from spotspeed.staging.sources import Source

_HELP_AGAIN_S = 0.05
"""How often a thread that waits looks whether there is more to copy."""
_STALL_MIN_S = 0.001
NOTHING_FROZEN = FrozenShare()
NO_WINDOW = Window((), (), "off", seed=0)
T = TypeVar("T")
_logger = logging.getLogger("spotspeed")


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
        self._window = window
        self._settings = settings
        self._began = time.monotonic()
        self._flow: ChunkFlow | None = None
        self._origin: Origin | None = None
        self._copying: list[CopyHandle] = []
        self._lock = threading.Lock()
        self._claim_lock = threading.Lock()
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
        while True:
            self._settings.help(self, deadline)
            left_s = _HELP_AGAIN_S if deadline is None else deadline - time.monotonic()
            try:
                self.staging_completion.exception(max(0.0, min(left_s, _HELP_AGAIN_S)))
            except TimeoutError:
                if left_s <= 0:
                    return False
            else:
                return True

    def abandon(self, reason: str) -> None:
        """Give this save up; what was written of it is removed. Harmless when it is sealed."""
        self._end(StorageError(f"{self.ticket.directory} was abandoned: {reason}"), tell=True)

    @property
    def staged_bytes(self) -> int:
        """Bytes that are in the saver's hands."""
        flow = self._flow
        return 0 if flow is None else min(self.size_bytes, flow.sent_bytes)

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
    def is_stored(self) -> bool:
        """Whether this rank's part is known to be durable, at the store or on the node's disk."""
        return self._is_kept or _is_fine(self.stored_completion)

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
            self._end(error, tell=True)
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
            if self._is_over:
                return
        _resolve(self.stored_completion, None)

    def sealed(self, manifest: Manifest, stored_form: bytes) -> None:
        """The saver says: sealed."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        self.manifest_bytes = stored_form
        # On a busy machine the seal is heard before the thread that sent the end goes on.
        self._settle_staging()
        _resolve(self.stored_completion, None)
        _resolve(self.upload_completion, manifest)
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
            flow = self._open(may_start=deadline is None)
            claimed = {} if flow is None else flow.claim(deadline)
        finally:
            self._claim_lock.release()
        if flow is None:
            return False
        if claimed and not self._fill(flow, claimed, is_urgent):
            return False
        is_full = flow.session.pool.free_count == 0
        if flow.send(eager=is_full or not claimed):
            self._finish(flow)
        return bool(claimed)

    def _fill(self, flow: ChunkFlow, claimed: dict[int, int], is_urgent: bool) -> bool:
        """Copy chunks into their slots; whether anybody still wants them."""
        origin = self._origin
        try:
            assert origin is not None, "it goes when all chunks have been handed over"
            plan = CopyPlan(origin)
            for chunk, slot in claimed.items():
                plan.add(flow.layout.chunks[chunk], flow.session.slot_address(slot))
            plan.run(self._settings.urgent if is_urgent else self._settings.lazy, self._begun)
        except BaseException:
            # Whatever ends this thread, the others' saves need the slots.
            flow.release(claimed.values())
            raise
        return flow.fill(claimed)

    def _begun(self, handle: CopyHandle) -> None:
        with self._lock:
            self._copying = [other for other in self._copying if not other.done()] + [handle]

    def _open(self, *, may_start: bool) -> ChunkFlow | None:
        """Announce the save; called under the claim lock.

        None where no saver is at hand and this thread may not start one, which can take long.
        """
        if self._flow is None:
            session = self._settings.session(may_start)
            if session is None:
                return None
            new = tuple(NewObject(group.content, len(group.fragments))
                        for group in self._frozen.new)  # fmt: skip
            number = self._settings.number()
            session.listen(number, self)
            announced = session.announcer.announce(Begin(
                number, self.ticket, self.rank, 0, 0, 0, self._settings.orders.compression,
                tuple(self._fragments), new, self._frozen.referred,
                self._settings.orders.is_direct,
            ))  # fmt: skip
            flow = ChunkFlow(session, announced.layout, number)
            origin = Origin(announced.geometry, self._sources)
            with self._lock:
                self._flow, self._origin = flow, origin
                is_wanted = not self._is_over
            if not is_wanted:
                flow.close()
                session.send(Abandon(flow.number, "abandoned before it began"))
        return self._flow

    def _finish(self, flow: ChunkFlow) -> None:
        """Everything has been handed over; it counts once nothing is seen to have changed.

        What changes from here on is not looked at: then the tensors may. Raises CaptureError.
        """
        self._window.verify()
        if not self._is_over:
            flow.session.send(End(flow.number), self._settle_staging)

    def _settle_staging(self) -> None:
        """Everything is in the saver's hands."""
        stalled_s = 0.0 if self._flow is None else self._flow.stalled_s
        facts = StagingFacts(self.size_bytes, time.monotonic() - self._began, stalled_s)
        if not _resolve(self.staging_completion, facts):
            return
        self._sources, self._origin, self._window = (), None, NO_WINDOW
        emit(Staged(self.ticket.directory, self.rank, self.size_bytes, facts.elapsed_s))
        if stalled_s >= _STALL_MIN_S:
            cause = "the staging pool was full and the saver still writing"
            emit(Stalled(cause, stalled_s, self.ticket.step))

    def _end(self, error: SpotSpeedError, *, tell: bool) -> None:
        """Settle as failed."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            flow = self._flow
        if flow is not None:
            flow.close()
            if tell:
                with contextlib.suppress(StorageError):
                    flow.session.send(Abandon(flow.number, str(error)))
        for future in (self.staging_completion, self.stored_completion, self.upload_completion):
            with contextlib.suppress(InvalidStateError):
                future.set_exception(error)


@dataclass(frozen=True, slots=True)
class CopySettings:
    """What a save needs of its stager."""

    session: Callable[[bool], SaverSession | None]
    """Given True it starts a saver where there is none, which may take long."""
    number: Callable[[], int]
    help: Callable[[StagedSave, float | None], None]
    lazy: CopyEngine
    urgent: CopyEngine
    orders: Orders


def _resolve(future: Future[T], value: T) -> bool:
    """Whether this is what the future came to, and not something before.

    Its callbacks are other people's code: no lock may be held.
    """
    try:
        future.set_result(value)
    except InvalidStateError:
        return False
    return True


def _is_fine(future: Future[Any]) -> bool:
    return future.done() and future.exception() is None
