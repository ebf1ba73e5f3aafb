"""Watches the saves whose own part is durable until somebody, perhaps this saver, seals them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spotspeed.agent.incoming import Part
from spotspeed.checkpoint.commit import try_seal
from spotspeed.core.manifest import Manifest, Ticket
from spotspeed.errors import SpotSpeedError, StorageError
from spotspeed.storage.contract import Storage

FIRST_PAUSE_S = 0.005
LONGEST_PAUSE_S = 0.1
LONGEST_REMOTE_PAUSE_S = 1.0
"""An object store bills every look."""
SEAL_TIMEOUT_S = 3600.0
"""After so long without the other ranks' receipts the save is reported as failed; should they
come later, the last of them still seals it."""
ORPHAN_PATIENCE_S = 60.0
"""How long a store that fails is asked again about a save whose rank is gone."""
REMEMBERED = 8
"""So many of the last seals are told to ranks whose parts come after them."""
_logger = logging.getLogger("spotspeed")

Outcome = Callable[[Any, Manifest | SpotSpeedError], None]
"""Called with the part that was added, and what became of its checkpoint."""


class _Hindered:
    """The store did not tell whether all receipts are there."""


class HopelessError(StorageError):
    """Another rank has lost its part for good, so that nobody will seal the save."""


@dataclass(slots=True, eq=False)
class _Watched:
    save: Part
    on_outcome: Outcome
    is_wanted: Callable[[], bool]
    began: float
    due: float
    pause_s: float
    is_ordered: bool
    is_passed: bool = False
    """Whether a later save has been sealed."""


class Sealer:
    """One thread that tries to seal every stored save, again and again with growing pauses.

    Ranks of one node that wait for the same checkpoint share the attempts.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        is_local = "://" not in storage.url
        self._longest_pause_s = LONGEST_PAUSE_S if is_local else LONGEST_REMOTE_PAUSE_S
        self._watched: list[_Watched] = []
        self._broken: dict[tuple[str, int], StorageError] = {}
        self._seals: deque[Manifest] = deque(maxlen=REMEMBERED)
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="sealer", daemon=True).start()

    def add(
        self, save: Part, on_outcome: Outcome, *, is_wanted: Callable[[], bool],
        is_ordered: bool = False,
    ) -> None:  # fmt: skip
        """Watch `save`; `on_outcome` is called once, on the sealer's thread.

        When all ranks store their saves in their order (`is_ordered`), one that is not complete
        when a later one is sealed never will be.

        While `is_wanted()` is false (the rank is gone) the save is let go after a first attempt
        that found other ranks missing: they, or the next start, will seal it. One in which the
        store failed has found nothing.
        """
        now = time.monotonic()
        with self._changed:
            self._watched.append(
                _Watched(save, on_outcome, is_wanted, now, now, FIRST_PAUSE_S, is_ordered)
            )
            self._changed.notify_all()

    def broken(self, directory: str, rank: int, reason: str, *, is_final: bool = True) -> None:
        """A rank of this node cannot complete its part: nobody will seal `directory`.

        Unless `is_final`, a later saver may complete it.
        """
        kind = HopelessError if is_final else StorageError
        with self._changed:
            self._broken[directory, rank] = kind(f"{directory} will not be sealed: {reason}")
            for watched in self._watched:
                if watched.save.ticket.directory == directory:
                    watched.due = 0.0
            self._changed.notify_all()

    def mended(self, directory: str, rank: int) -> None:
        """The rank tries again."""
        with self._changed:
            self._broken.pop((directory, rank), None)

    def _run(self) -> None:
        while True:
            with self._changed:
                due = min((watched.due for watched in self._watched), default=None)
                wait_s = None if due is None else due - time.monotonic()
                if wait_s is None or wait_s > 0:
                    self._changed.wait(wait_s)
                    continue
                first = min(self._watched, key=lambda watched: watched.due)
                ticket = first.save.ticket
                group = [watched for watched in self._watched
                         if watched.save.ticket.directory == ticket.directory]  # fmt: skip
            outcome = self._try(ticket)
            settled = [watched for watched in group if self._settle(watched, outcome)]
            with self._changed:
                self._watched = [watched for watched in self._watched if watched not in settled]
                if isinstance(outcome, Manifest):
                    self._pass(ticket)

    def _pass(self, sealed: Ticket) -> None:
        """Look once more at what should have been sealed before; called under the lock.

        The save of a notice is stored beside the others, so that it tells nothing of them.
        """
        if sealed.reason == "notice":
            return
        for watched in self._watched:
            ticket = watched.save.ticket
            is_older = ticket.epoch == sealed.epoch and ticket.step < sealed.step
            if watched.is_ordered and is_older and ticket.reason != "notice":
                watched.is_passed, watched.due = True, 0.0

    def _settle(
        self, watched: _Watched, outcome: Manifest | SpotSpeedError | _Hindered | None
    ) -> bool:
        """Apply what an attempt gave; whether the save is settled now."""
        waited_s = time.monotonic() - watched.began
        is_known = not isinstance(outcome, _Hindered) or waited_s > ORPHAN_PATIENCE_S
        outcome = None if isinstance(outcome, _Hindered) else outcome
        if not isinstance(outcome, Manifest):
            outcome = watched.save.stopped or outcome
        if outcome is None and waited_s > SEAL_TIMEOUT_S:
            outcome = StorageError(
                f"{watched.save}: this rank's part has been durable for {SEAL_TIMEOUT_S:.0f} s and "
                f"other ranks' receipts are still missing"
            )
        if outcome is not None:
            watched.on_outcome(watched.save, outcome)
            return True
        if is_known:
            watched.save.progress.state = "stored"
            if not watched.is_wanted():
                return True
        longest_s = max(self._longest_pause_s, min(1.0, waited_s / 20))
        watched.pause_s = min(2 * watched.pause_s, longest_s)
        watched.due = time.monotonic() + watched.pause_s
        return False

    def _try(self, ticket: Ticket) -> Manifest | SpotSpeedError | _Hindered | None:
        # A part that comes after the seal needs nothing of a disk that may be full by now.
        if known := next((seal for seal in self._seals if seal.ticket == ticket), None):
            return known
        directory = ticket.directory
        manifest: Manifest | _Hindered | None
        try:
            manifest = try_seal(self._storage, ticket)
            if manifest is not None:
                self._seals.append(manifest)
        except StorageError as error:
            _logger.warning("%s: sealing failed for now: %s", directory, error)
            manifest = _Hindered()
        except SpotSpeedError as error:
            return error
        except Exception as error:
            # The other saves of this node still need this thread.
            _logger.exception("%s: sealing failed", directory)
            return StorageError(f"{directory}: sealing failed in the saver: {error!r}")
        with self._changed:
            broken = [error for (at, _), error in self._broken.items() if at == directory]
            is_passed = any(watched.is_passed for watched in self._watched
                            if watched.save.ticket.directory == directory)  # fmt: skip
        if manifest is None and is_passed:
            return HopelessError(
                f"{directory} will not be sealed: a later save is, and other ranks' parts of this "
                f"one have not come, so they are lost"
            )
        if not isinstance(manifest, Manifest) and broken:
            return next((error for error in broken if isinstance(error, HopelessError)), broken[0])
        return manifest
