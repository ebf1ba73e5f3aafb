"""Keeps the path tidy while the training goes on: collects after each seal, on its own thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from spotspeed import events
from spotspeed.checkpoint import rotation
from spotspeed.checkpoint.gc import Scope, collect
from spotspeed.checkpoint.sweep import Sweeper
from spotspeed.config import KeepConfig
from spotspeed.core.retention import SILENCE_S, Keep, Work
from spotspeed.errors import SpotSpeedError
from spotspeed.storage.contract import Storage

CLOSE_TIMEOUT_S = 2.0


class Collector:
    """Removes what `keep` no longer keeps, each time it is told that something was sealed.

    Failures are events: a checkpoint too many harms nobody.
    """

    def __init__(
        self, storage: Storage, keep: KeepConfig, *, epoch: int,
        is_quiet: Callable[[], bool] = lambda: True, work: Callable[[], Work | None] = lambda: None,
    ) -> None:  # fmt: skip
        """`is_quiet` says that no save is in flight; `work`, which are, and who else may write."""
        self._storage, self._epoch = storage, epoch
        self._keep = Keep(keep.last, keep.every_steps)
        self._work = work
        self._sweeper = Sweeper(storage, is_patient=True, is_quiet=is_quiet)
        self._thorough_at = 0.0
        self._wishes: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="spotspeed-gc", daemon=True)
        self._thread.start()
        rotation.tell(storage, self.sealed)

    def begin(self, epoch: int) -> None:
        """From now on this launch is epoch `epoch`."""
        self._epoch = epoch

    def sealed(self, _: Any = None) -> None:
        """Something newer is sealed, or something was given up; returns at once."""
        self._wishes.put(True)

    def close(self) -> None:
        """Stop, and wait a little for what was begun: a later launch removes what is left."""
        rotation.tell(self._storage, None)
        self._wishes.put(False)
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while self._wishes.get():
            now = time.monotonic()
            is_due = now >= self._thorough_at
            if is_due:
                self._thorough_at = now + SILENCE_S
            try:
                collect(self._storage, self._keep, epoch=self._epoch, sweeper=self._sweeper,
                        scope=Scope(is_due, self._work()))  # fmt: skip
            except SpotSpeedError as error:
                events.emit(events.Lost("old checkpoints were not removed", str(error)))
