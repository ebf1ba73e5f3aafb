"""The saves of this rank in their order: a worker thread that describes, stages and hands over."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from spotspeed.core.manifest import Manifest, Ticket
from spotspeed.errors import CaptureError, SpotSpeedError
from spotspeed.staging.staged import StagedSave, StagingFacts


@dataclass(frozen=True, slots=True)
class SaveHandle:
    """One save in flight.

    `staging_completion` resolves when the tensors may be changed again; `upload_completion`
    resolves to the sealed manifest once the checkpoint is durable at its path. Both raise what
    went wrong.
    """

    ticket: Ticket
    staging_completion: Future[StagingFacts] = field(default_factory=Future)
    upload_completion: Future[Manifest] = field(default_factory=Future)

    @property
    def tag(self) -> str:
        return self.ticket.tag

    @property
    def step(self) -> int:
        return self.ticket.step

    def wait(self, timeout_s: float | None = None) -> Manifest:
        """Block until durable; raises what went wrong, or TimeoutError."""
        return self.upload_completion.result(timeout_s)

    def fail(self, error: BaseException) -> None:
        """Resolve whatever is still open with `error`."""
        for future in (self.staging_completion, self.upload_completion):
            if not future.done():
                future.set_exception(error)


Begin = Callable[[SaveHandle], StagedSave]
"""Describe and stage one save."""


class SaveQueue:
    """Runs `begin` for each submitted save on one daemon thread, in order."""

    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._jobs: queue.SimpleQueue[SaveHandle | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._handles: list[SaveHandle] = []
        self._thread = threading.Thread(target=self._run, name="spotspeed-saves", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket) -> SaveHandle:
        """Queue one save; returns at once."""
        handle = SaveHandle(ticket)
        with self._lock:
            self._handles = [h for h in self._handles if not h.upload_completion.done()]
            self._handles.append(handle)
        self._jobs.put(handle)
        return handle

    def unfinished(self) -> list[SaveHandle]:
        """Saves that are neither durable nor failed, oldest first."""
        with self._lock:
            return [h for h in self._handles if not h.upload_completion.done()]

    def unstaged(self) -> list[SaveHandle]:
        """Saves whose bytes are still, or may still be, read from the live tensors."""
        return [h for h in self.unfinished() if not h.staging_completion.done()]

    def close(self) -> None:
        """Take no more saves; those submitted go on."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (handle := self._jobs.get()) is not None:
            try:
                staged = self._begin(handle)
            except SpotSpeedError as error:
                handle.fail(error)
            except Exception as error:  # whatever DeepSpeed's objects raise must not end the thread
                handle.fail(CaptureError(f"{handle.ticket.directory}: {error!r}"))
            else:
                _chain(staged.staging_completion, handle.staging_completion)
                _chain(staged.upload_completion, handle.upload_completion)


def _chain(source: Future[Any], target: Future[Any]) -> None:
    def copy(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            target.set_result(done.result())
        elif not target.done():
            target.set_exception(error)

    source.add_done_callback(copy)
