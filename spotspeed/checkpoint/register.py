"""The saves of one launch by step and attempt, so that all ranks join the same ones."""

from __future__ import annotations

import threading
from collections.abc import Callable

from spotspeed.checkpoint.agreement import Exchange, share_all
from spotspeed.checkpoint.named import NamedSave
from spotspeed.checkpoint.queue import SaveHandle, SaveQueue
from spotspeed.checkpoint.session import Standing
from spotspeed.checkpoint.survivors import Lost
from spotspeed.core.manifest import Manifest, Ticket


class SaveRegister:
    """Hands each new save to `queue`, once; any thread may use it."""

    def __init__(self, queue: SaveQueue) -> None:
        self._queue = queue
        self._lock = threading.Lock()
        self._handles: dict[tuple[int, str], SaveHandle] = {}
        self._named: dict[tuple[int, str], NamedSave] = {}
        self._lost: dict[tuple[int, str], Lost] = {}
        self._named_count = 0
        self._finishing: list[SaveHandle] = []

    def submit(
        self, ticket: Ticket, *, again: bool = False, lost: Lost = ()
    ) -> tuple[SaveHandle, bool]:
        """The save of the ticket's step and attempt, and whether it is a new one.

        The name decides alone, so that all ranks join the same saves whatever happened first; with
        `again` one that has failed here is begun anew. The ranks in `lost` have no part in it.
        """
        with self._lock:
            known = self._handles.get((ticket.step, ticket.attempt))
            if known is not None and not (again and known.has_failed):
                return known, False
            self._lost[ticket.step, ticket.attempt] = lost
            handle = self._queue.submit(ticket)
            self._handles = {
                key: value for key, value in self._handles.items()
                if key[0] == ticket.step or not value.upload_completion.done()
            }  # fmt: skip
            self._handles[ticket.step, ticket.attempt] = handle
            return handle, True

    def name(self, step: int, named: NamedSave) -> str:
        """An attempt for a save that carries `named`; the same on every rank."""
        with self._lock:
            self._named_count += 1
            attempt = f"{named.attempt_prefix}{self._named_count}"
            self._named[step, attempt] = named
        return attempt

    def named(self, handle: SaveHandle) -> NamedSave:
        """What `handle` carries beside the training state; to be asked once."""
        with self._lock:
            return self._named.pop((handle.step, handle.ticket.attempt), NamedSave("", ""))

    def lost(self, handle: SaveHandle) -> Lost:
        """The ranks that have no part in it."""
        with self._lock:
            return self._lost.pop((handle.step, handle.ticket.attempt), ())

    def then(self, handle: SaveHandle, finish: Callable[[Manifest], Manifest]) -> SaveHandle:
        """`handle.then(finish)`, which `settle` waits for as well."""
        outer = handle.then(finish)
        with self._lock:
            self._finishing = [h for h in self._finishing if not h.upload_completion.done()]
            self._finishing.append(outer)
        return outer

    def settle(self, exchange: Exchange, timeout_s: float) -> None:
        """Wait until every save is durable, here or nowhere, or has failed; every rank calls it."""
        self._drop_hopeless(exchange)
        for handle in (*self._queue.unfinished(), *self._finishing):
            handle.upload_completion.exception(timeout_s)

    def forget(self) -> None:
        """Another state follows: its steps are not those of the saves so far."""
        with self._lock:
            self._handles = {}

    def has_everywhere(self, exchange: Exchange, step: int, standing: Standing | None) -> bool:
        """Whether some save of `step`, or `standing`, is under way or durable on every rank."""
        if standing is not None and step == standing.step:
            return True
        with self._lock:
            mine = [attempt for (at, attempt), handle in self._handles.items()
                    if at == step and not handle.has_failed]  # fmt: skip
        known = share_all(exchange, f"close-{step}", mine)
        return bool(set.intersection(*map(set, known)))

    def _drop_hopeless(self, exchange: Exchange) -> None:
        """Give up the saves that some rank has already lost: they can never be complete."""
        with self._lock:
            failed = [handle.ticket.directory for handle in self._handles.values()
                      if handle.has_failed]  # fmt: skip
        lost = set().union(*share_all(exchange, "close-lost", failed))
        for handle in self._queue.unfinished():
            if handle.ticket.directory in lost:
                handle.abandon("another rank has lost its part")
