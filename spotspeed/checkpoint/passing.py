"""Tells ranks that wait for all to ask for a save when one of them has gone past it.

A save is agreed on before it begins, so a rank that asks alone waits, and a rank that did not ask
soon waits for it in a collective of the training. Nobody can tell that from a rank that is merely
slow, except by where that rank is: it counts its training forwards, and one that has begun more
than the ranks that ask will not come. A rank that waits long therefore leaves its count at `path`:

    PATH/asking/EPOCH/SAVE     the forwards that who asks for the SAVE-th save has begun

and a rank that has not moved for as long looks there. If it has gone past, it answers in the ranks'
agreement in place of its main thread, and all that ask get an error that names it; training may go
on. A rank that is slow, but still to come, has begun no such forward and is waited for as before.
Each save has a name of its own, so that whoever takes its question away late takes no later one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator

from spotspeed import events
from spotspeed.checkpoint.agreement import Exchange
from spotspeed.errors import (
    CoordinationError,
    CorruptionError,
    ObjectNotFoundError,
    SpotSpeedError,
    StorageError,
)
from spotspeed.storage.contract import Storage

PATIENCE_S = 5.0
"""How long a rank asks, or stays where it is, before it uses the store."""
REMOTE_PATIENCE_S = 30.0
"""The same where every look is billed."""
_MAX_ASK_BYTES = 1024
_logger = logging.getLogger("spotspeed")


class Passing:
    """One rank's side; `forwards` counts the training forwards that it has begun."""

    def __init__(
        self, storage: Storage, epoch: int, *, forwards: Callable[[], int], exchange: Exchange
    ) -> None:
        self._storage, self._prefix = storage, f"asking/{epoch}"
        self._forwards, self._exchange = forwards, exchange
        self._first_s = REMOTE_PATIENCE_S if "://" in storage.url else PATIENCE_S
        self._seen, self._due, self._wait_s = -1, 0.0, self._first_s
        self._is_asking = False
        self._count = 0

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """While this rank's main thread waits for the others to ask as well."""
        ended, self._is_asking = threading.Event(), True
        self._count += 1
        question = (self._count, self._forwards())
        asker = threading.Thread(target=self._ask, args=(ended, *question), daemon=True,
                                 name="spotspeed-asking")  # fmt: skip
        asker.start()
        try:
            yield
        finally:
            ended.set()
            self._is_asking = False

    def look(self) -> None:
        """To be called every second or so, on no thread that trains."""
        mine, now = self._forwards(), time.monotonic()
        if self._is_asking or mine != self._seen:
            self._seen, self._wait_s, self._due = mine, self._first_s, now + self._first_s
        elif now >= self._due:
            self._wait_s *= 2
            self._due = now + self._wait_s
            save = self._count + 1
            theirs = self._asked(save)
            # The main thread may have begun to ask, or have asked, while the store was read.
            is_free = not self._is_asking and save == self._count + 1
            if theirs is not None and theirs < mine and is_free:
                self._count = save
                self._answer(mine - theirs)

    def _ask(self, ended: threading.Event, save: int, forwards: int) -> None:
        if ended.wait(self._first_s):
            return
        key = f"{self._prefix}/{save}"
        try:
            self._storage.put(key, json.dumps({"forwards": forwards}).encode())
            ended.wait()
            self._storage.delete(key)
        except StorageError as error:
            events.emit(events.Lost("the question who else asks for a save", str(error)))

    def _asked(self, save: int) -> int | None:
        """How many forwards who asks for the `save`-th save has begun; None: nobody asks."""
        key = f"{self._prefix}/{save}"
        try:
            return int(json.loads(self._storage.get(key, _MAX_ASK_BYTES))["forwards"])
        except ObjectNotFoundError:
            return None
        except (StorageError, CorruptionError, ValueError, TypeError, KeyError) as error:
            _logger.info("%s: %s", key, error)  # The next look may tell more.
            return None

    def _answer(self, count: int) -> None:
        try:
            self._exchange(f"no save: {count} forwards past it", b"")
        except CoordinationError as error:
            events.emit(events.Lost("a save that some ranks asked for alone", str(error)))
        except SpotSpeedError as error:
            events.emit(events.Lost("the answer to ranks that ask for a save", str(error)))
