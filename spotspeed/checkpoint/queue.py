"""The saves of this rank in their order: a worker thread that describes, stages and hands over."""

from __future__ import annotations

import contextlib
import queue
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, TypeVar

from spotspeed import events
from spotspeed.config import StagingConfig
from spotspeed.core.manifest import Manifest, Ticket
from spotspeed.core.saver_protocol import Cost
from spotspeed.core.tiers import Level
from spotspeed.errors import CaptureError, SpotSpeedError, StorageError
from spotspeed.staging.staged import StagedSave, StagingFacts

IDLE_S = 2.0
STALL_REPORT_S = 1.0
"""A step that is held for longer than this is reported."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SaveProgress:
    """How far this rank's part of a save is, in bytes; each stage counts what reached it."""

    total_bytes: int
    """0 until the save has been described."""
    staged_bytes: int
    """In the saver's hands: they survive this process."""
    stored_bytes: int
    """In this rank's shard, durable: all or nothing."""
    sealed_bytes: int
    """Part of a checkpoint that is complete on all ranks: all or nothing."""
    level: Level | None = None
    """What this rank's part survives: the ranks, the saver and a reboot, the node."""


@dataclass(slots=True, eq=False)
class SaveHandle:
    """One save in flight.

    `staging_completion` resolves when the tensors may be changed again; `upload_completion`
    resolves to the sealed manifest once the checkpoint is durable at its path. Both raise what
    went wrong.
    """

    ticket: Ticket
    staging_completion: Future[StagingFacts] = field(default_factory=Future)
    upload_completion: Future[Manifest] = field(default_factory=Future)
    stored_completion: Future[None] = field(default_factory=Future, repr=False)
    """Resolves when this rank's part is durable, whatever becomes of the others'."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _described: threading.Event = field(default_factory=threading.Event, repr=False)
    _begun: threading.Event = field(default_factory=threading.Event, repr=False)
    _staged: StagedSave | None = field(default=None, repr=False)
    _given_up: str = field(default="", repr=False)
    _inner: SaveHandle | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # A waiter that has lost patience, as asyncio.wait_for, must not cancel them for all others.
        for future in (self.staging_completion, self.stored_completion, self.upload_completion):
            future.set_running_or_notify_cancel()

    @property
    def tag(self) -> str:
        return self.ticket.tag

    @property
    def step(self) -> int:
        return self.ticket.step

    @property
    def has_failed(self) -> bool:
        """Whether it is known that it will not become durable."""
        done = self.upload_completion.done()
        return done and self.upload_completion.exception() is not None

    @property
    def costs(self) -> tuple[Cost, ...]:
        """What the saver took to make this rank's part durable, on the node and at the store."""
        if self._inner is not None:
            return self._inner.costs
        return () if self._staged is None else self._staged.costs

    def wait(self, timeout: float | None = None, *, timeout_s: float | None = None) -> Manifest:
        """Block until durable; raises what went wrong, or TimeoutError.

        `timeout` is in seconds; `timeout_s` is the same by another name.
        """
        return self.upload_completion.result(timeout_s if timeout is None else timeout)

    def progress(self) -> SaveProgress:
        """How far it is; any thread may ask at any time."""
        if self._inner is not None:
            return self._inner.progress()
        staged = self._staged
        total = 0 if staged is None else staged.size_bytes
        return SaveProgress(
            total,
            0 if staged is None else staged.staged_bytes,
            total if _is_fine(self.stored_completion) else 0,
            total if _is_fine(self.upload_completion) else 0,
            self.level,
        )

    @property
    def level(self) -> Level | None:
        """The level that this rank's part has reached; "remote" when the checkpoint is sealed."""
        if self._inner is not None:
            return self._inner.level
        return None if self._staged is None else self._staged.level

    def then(self, finish: Callable[[Manifest], Manifest]) -> SaveHandle:
        """The same save with one more thing to do after the seal, on a thread of its own.

        `upload_completion` resolves to what `finish` returns, or raises its SpotSpeedError.
        """
        outer = SaveHandle(self.ticket, _inner=self)
        _chain(self.staging_completion, outer.staging_completion)
        _chain(self.stored_completion, outer.stored_completion)

        def run() -> None:
            error = self.upload_completion.exception()
            if error is not None:
                return _reject(outer.upload_completion, error)
            try:
                result = finish(self.upload_completion.result())
            except SpotSpeedError as failure:
                error = failure
            except Exception as failure:  # whoever waits must hear of it, whatever it was
                error = StorageError(f"{self.tag}: {failure!r}")
            else:
                return _resolve(outer.upload_completion, result)
            events.emit(events.Lost(f"{self.ticket.directory}, after its seal", str(error)))
            _reject(outer.upload_completion, error)

        self.upload_completion.add_done_callback(
            lambda _: threading.Thread(target=run, name="spotspeed-finish", daemon=True).start()
        )
        return outer

    def abandon(self, why: str) -> None:
        """Give it up; harmless when it is durable or has failed already."""
        if self._inner is not None:
            return self._inner.abandon(why)
        with self._lock:
            staged, self._given_up = self._staged, why
        if staged is not None:
            staged.abandon(why)
        else:
            self._fail(StorageError(f"{self.ticket.directory} was abandoned: {why}"))

    def wait_staged(self, timeout_s: float | None) -> bool:
        """Wait, helping to copy, until the tensors may change; False after `timeout_s`."""
        began = time.monotonic()
        if not self._begun.wait(timeout_s):
            return False
        if self._staged is None:
            return True
        left_s = None if timeout_s is None else max(0.0, timeout_s - time.monotonic() + began)
        return self._staged.wait_staged(left_s)

    def wait_described(self, timeout_s: float) -> None:
        """Wait until a change of the tensors is one that `staging.check` can see."""
        self._described.wait(timeout_s)

    def _describe(self, describe: Describe) -> Any:
        described = self._attempt(lambda: describe(self))
        self._described.set()
        return described

    def _begin(self, begin: Begin, described: Any) -> None:
        staged: StagedSave | None = self._attempt(lambda: begin(self, described))
        if staged is not None:
            with self._lock:
                self._staged, why = staged, self._given_up
            if why:
                staged.abandon(why)
            _chain(staged.staging_completion, self.staging_completion)
            _chain(staged.stored_completion, self.stored_completion)
            _chain(staged.upload_completion, self.upload_completion)
        self._begun.set()

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """`work`, unless the save is over; what it raises ends this save."""
        if self.upload_completion.done():
            return None
        try:
            return work()
        except SpotSpeedError as error:
            self._fail(error)
        except Exception as error:  # whatever DeepSpeed's objects raise ends this save only
            self._fail(CaptureError(f"{self.ticket.directory}: {error!r}"))
        return None

    def _fail(self, error: SpotSpeedError) -> None:
        for future in (self.staging_completion, self.stored_completion, self.upload_completion):
            _reject(future, error)
        self._described.set()
        self._begun.set()


Describe = Callable[[SaveHandle], Any]
"""Look at the tensors of one save as they are; gives what `Begin` wants to know."""
Begin = Callable[[SaveHandle, Any], StagedSave]
"""Stage one save, given what `Describe` gave."""


class SaveQueue:
    """Runs `describe` and `begin` for each submitted save on one daemon thread, in order.

    Between the two, `await_state(step, over)` returns when the state of a step is complete, which
    may take long, or when the save is over. `on_idle()` is called every `IDLE_S` while there is
    nothing to do.
    """

    def __init__(
        self, describe: Describe, begin: Begin,
        await_state: Callable[[int, Future[Manifest]], None],
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._describe, self._begin = describe, begin
        self._await_state, self._on_idle = await_state, on_idle
        self._jobs: queue.SimpleQueue[SaveHandle | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._handles: list[SaveHandle] = []
        self._window: list[SaveHandle] = []
        self._cause = ""
        self._thread = threading.Thread(target=self._run, name="spotspeed-saves", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket) -> SaveHandle:
        """Queue one save; returns at once."""
        handle = SaveHandle(ticket)
        handle.upload_completion.add_done_callback(lambda _: self._report(handle))
        with self._lock:
            self._handles = [h for h in self._handles if not h.upload_completion.done()]
            self._handles.append(handle)
            self._window.append(handle)
        self._jobs.put(handle)
        return handle

    def unfinished(self) -> list[SaveHandle]:
        """Saves that are neither durable nor failed, oldest first."""
        with self._lock:
            return [h for h in self._handles if not h.upload_completion.done()]

    def hold(
        self, handle: SaveHandle | None, staging: StagingConfig, *, has_ended: bool = True
    ) -> None:
        """Called where a save may have been submitted, before the caller goes on.

        A save that somebody asked for is watched from there on, and with a full check every one;
        others soon after. With `lazy: false` all is copied on return, if the step `has_ended`.
        """
        is_asked = handle is not None and handle.ticket.reason == "explicit"
        if handle is not None and staging.check in ("full", "sampled" if is_asked else "full"):
            handle.wait_described(staging.max_hold_s)
        if has_ended and not staging.lazy:
            self.close_window(staging.max_hold_s)

    def close_window(self, max_hold_s: float) -> float:
        """Wait until the tensors may change; returns the seconds that this took.

        A save that needs more than `max_hold_s` is abandoned, but for one on notice.
        """
        if not self._window:
            return 0.0
        began = time.monotonic()
        with self._lock:
            window, self._window = self._window, []
        for handle in window:
            left_s = max(0.0, max_hold_s - time.monotonic() + began)
            if not handle.wait_staged(None if handle.ticket.reason == "notice" else left_s):
                handle.abandon(f"it would have held a step for more than {max_hold_s:g} s")
        return time.monotonic() - began

    def open_gate(self, max_hold_s: float, step: int) -> None:
        """Close the window before the update after `step`; a step that is held long is reported."""
        held_s = self.close_window(max_hold_s)
        if held_s > STALL_REPORT_S:
            events.emit(events.Stalled("staging", held_s, step))

    def close(self) -> None:
        """Take no more saves; those submitted go on."""
        self._jobs.put(None)

    def _run(self) -> None:
        while True:
            try:
                handle = self._jobs.get(timeout=IDLE_S)
            except queue.Empty:
                self._on_idle()
                continue
            if handle is None:
                return
            self._serve(handle)
            del handle  # Nothing of a save is to live until the next.

    def _report(self, handle: SaveHandle) -> None:
        """A save has ended; of those that one cause fails, the first is told as news."""
        error = handle.upload_completion.exception()
        cause = "" if error is None else _kind_of(error)
        with self._lock:
            before, self._cause = self._cause, cause
        if error is not None:
            directory = handle.ticket.directory
            events.emit(events.Lost(directory, str(error), is_repeated=cause == before))

    def _serve(self, handle: SaveHandle) -> None:
        described = handle._describe(self._describe)
        self._await_state(handle.step, handle.upload_completion)
        handle._begin(self._begin, described)


def _is_fine(future: Future[Any]) -> bool:
    return future.done() and future.exception() is None


def _kind_of(error: BaseException) -> str:
    """What went wrong without the numbers in it, by which it is told from other causes."""
    return re.sub(r"\d+", "#", str(error))


def _chain(source: Future[Any], target: Future[Any]) -> None:
    def copy(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            _resolve(target, done.result())
        else:
            _reject(target, error)

    source.add_done_callback(copy)


def _resolve(future: Future[T], value: T) -> None:
    """It has come to this, unless it came to something before; no lock may be held."""
    with contextlib.suppress(InvalidStateError):
        future.set_result(value)


def _reject(future: Future[Any], error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)
