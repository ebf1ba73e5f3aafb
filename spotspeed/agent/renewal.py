"""Keeps the owner record of an epoch alive while its rank 0, or what that has staged, lives."""

from __future__ import annotations

import logging
import threading

from spotspeed.checkpoint.ownership import read_owner, renew
from spotspeed.core.owner import State
from spotspeed.errors import OwnedError, SpotSpeedError
from spotspeed.storage.contract import Storage

_logger = logging.getLogger("spotspeed")


class Renewal:
    """A thread that counts the owner record of `epoch` up every `period_s` seconds.

    It ends by itself when another epoch has begun or the owner has been released.
    """

    def __init__(self, storage: Storage, epoch: int, period_s: float) -> None:
        self._storage = storage
        self.epoch = epoch
        self._period_s = period_s
        self._state: State = "training"
        self._said: State = "training"
        self._is_over = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="renewal", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """The ranks are gone; say at once, and from now on, that only this saver still writes."""
        with self._changed:
            self._state = "draining"
            self._changed.notify_all()

    def stop(self) -> None:
        """Renew no more; what was asked for by `drain` has been said on return."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or self._has_news, self._period_s)
                state, is_over = self._state, self._is_over
                if is_over and not self._has_news:
                    return
            try:
                if not self._renew(state):
                    return
                self._said = state
            except OwnedError as error:
                _logger.error("%s", error)
                return
            except SpotSpeedError as error:
                _logger.warning("epoch %d was not renewed: %s", self.epoch, error)
            if is_over:
                return

    @property
    def _has_news(self) -> bool:
        return self._state != self._said

    def _renew(self, state: State) -> bool:
        """Whether the epoch is still ours to renew; it is renewed then."""
        owner = read_owner(self._storage)
        if owner is None or owner.epoch != self.epoch or owner.state == "released":
            return False
        renew(self._storage, owner, state=state)
        return True
