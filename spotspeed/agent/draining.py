"""Drains what is durable on the node's disk to the store: in order, notices first, patiently."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from spotspeed.agent.incoming import Part, StoppedError
from spotspeed.checkpoint.tiers import NodePart, drain_part, is_drained, is_wanted
from spotspeed.errors import CorruptionError, SpotSpeedError, StorageError
from spotspeed.storage.contract import Storage

PARALLEL = 4
"""Parts that are drained side by side."""
GIVE_UP_S = 900.0
"""A store that fails for so long is left alone; the parts stay on the node for the next saver."""
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 15.0
_TURN_S = 0.5
_URGENT = frozenset({"notice", "final", "explicit"})
_logger = logging.getLogger("spotspeed")


class SupersededError(StorageError):
    """What a saver left is not on the way to anything any more."""


def is_final(error: SpotSpeedError) -> bool:
    """Whether a part that could not be drained will never be: no later saver finds it here."""
    return isinstance(error, SupersededError | StoppedError | CorruptionError)


@dataclass(slots=True, eq=False)
class Drain:
    """One part on its way; `on_done` is called once, with what went wrong or None."""

    part: NodePart
    save: Part
    on_done: Callable[[SpotSpeedError | None], None]
    is_leftover: bool = False
    """Whether another saver left it, so that the store is looked at first."""

    @property
    def is_urgent(self) -> bool:
        return self.part.ticket.reason in _URGENT

    def __str__(self) -> str:
        return f"{self.part.ticket.directory}, rank {self.part.rank}"


class Drainer:
    """Copies parts from the node's tier to the store, each on a thread, a few at a time.

    The first come first; but while one that somebody waits for is there, all others stand still.
    """

    def __init__(self, node: Storage, storage: Storage, *, give_up_s: float = GIVE_UP_S) -> None:
        self._node, self._storage = node, storage
        self._give_up_s = give_up_s
        self._drains: list[Drain] = []
        self._changed = threading.Condition()
        self._copying = 0
        self._busy_began = 0.0
        self._busy_s = self._copied_bytes = 0.0

    def add(self, drain: Drain) -> None:
        """Take a part that is durable in the tier; returns at once."""
        with self._changed:
            self._drains.append(drain)
        threading.Thread(target=self._run, args=(drain,), name="drain", daemon=True).start()

    @property
    def bytes_per_s(self) -> float | None:
        """What the store has taken so far while anything was being copied; None when unknown."""
        with self._changed:
            return self._copied_bytes / self._busy_s if self._busy_s > 0 else None

    def _run(self, drain: Drain) -> None:
        outcome: SpotSpeedError | None = None
        try:
            outcome = self._drain(drain)
        except Exception as error:
            # Whoever waits for this part must hear of it, whatever it was.
            _logger.exception("%s could not be drained", drain)
            outcome = StorageError(f"{drain}: draining failed in the saver: {error!r}")
        with self._changed:
            self._drains.remove(drain)
            self._changed.notify_all()
        drain.on_done(outcome)

    def _drain(self, drain: Drain) -> SpotSpeedError | None:
        """Try until it is done or hopeless; returns what made it so."""
        first_failure, pause_s = None, _FIRST_PAUSE_S
        while True:
            try:
                self._await_turn(drain)
                self._once(drain)
                return None
            except (StorageError, CorruptionError) as error:
                if is_final(error):
                    return error
                now = time.monotonic()
                first_failure = now if first_failure is None else first_failure
                if now - first_failure + pause_s > self._give_up_s:
                    return StorageError(
                        f"{drain}: durable on this node only, in {self._node.url}; the next start "
                        f"on this node drains it. The store has failed for "
                        f"{now - first_failure:.0f} s: {error}"
                    )
                _logger.warning("%s: %s; trying again in %.1f s", drain, error, pause_s)
            try:
                drain.save.pause(pause_s)
            except StoppedError as error:
                return error
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _once(self, drain: Drain) -> None:
        if drain.is_leftover:
            if not is_wanted(self._storage, drain.part.ticket):
                raise SupersededError(
                    f"{drain}: a later launch has begun from before it, or something newer is "
                    f"sealed; what this node has of it is removed"
                )
            if is_drained(self._node, self._storage, drain.part):
                return
        with self._changed:
            self._copying += 1
            if self._copying == 1:
                self._busy_began = time.monotonic()
        copied, began = 0, time.monotonic()
        try:
            drain_part(self._node, self._storage, drain.part, lambda at: self._at(drain, at))
            copied = drain.part.size_bytes
            drain.save.progress.drained_s = time.monotonic() - began
        finally:
            with self._changed:
                self._copying -= 1
                self._copied_bytes += copied
                if self._copying == 0:
                    self._busy_s += time.monotonic() - self._busy_began

    def _at(self, drain: Drain, position: int) -> None:
        """Between two pieces: count, let more urgent ones go first, end when it is stopped."""
        drain.save.progress.written_bytes = position
        self._await_turn(drain)

    def _await_turn(self, drain: Drain) -> None:
        with self._changed:
            while not self._has_turn(drain):
                if drain.save.stopped is not None:
                    raise drain.save.stopped
                self._changed.wait(_TURN_S)
        if drain.save.stopped is not None:
            raise drain.save.stopped

    def _has_turn(self, drain: Drain) -> bool:
        urgent = [other for other in self._drains if other.is_urgent]
        return drain in (urgent or self._drains)[:PARALLEL]
