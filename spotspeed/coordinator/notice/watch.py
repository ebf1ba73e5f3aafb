"""Looks for notices again and again on a daemon thread, and delivers each once."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from spotspeed.coordinator.notice.contract import Notice, NoticeListener

_logger = logging.getLogger("spotspeed")

_BACKOFF_MAX_S = 10.0
_STOP_WAIT_S = 5.0


class LookError(Exception):
    """A place could not be looked at; the message says why. Looking goes on."""


class Stopped(Exception):
    """The watch was stopped while looking."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """A notice as found: `key` is equal whenever the same notice is seen again."""

    key: str
    notice: Notice


class Look(Protocol):
    """One look; raises LookError. `stop_fd` polls readable once it should raise Stopped."""

    def __call__(self, stop_fd: int) -> Iterable[Sighting]: ...


class Watch:
    """`NoticeSource` that calls `look` every `period_s`, more seldom while it fails."""

    def __init__(self, name: str, look: Look, *, period_s: float) -> None:
        self._name = name
        self._look = look
        self._period_s = period_s
        self._is_stopped = threading.Event()
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None
        self._delivered: set[str] = set()

    @property
    def name(self) -> str:
        return self._name

    @property
    def period_s(self) -> float:
        return self._period_s

    def start(self, listener: NoticeListener) -> None:
        self._thread = threading.Thread(
            target=self._run, args=(listener,), name=f"spotspeed-notice-{self._name}", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        if self._is_stopped.is_set():
            return
        os.eventfd_write(self._stop_fd, 1)
        self._is_stopped.set()
        if self._thread is None:
            os.close(self._stop_fd)
        elif self._thread is not threading.current_thread():
            self._thread.join(_STOP_WAIT_S)

    def _run(self, listener: NoticeListener) -> None:
        try:
            self._watch(listener)
        except Stopped:
            return
        finally:
            # Only a stopped watch ends; until then `stop` may still write here.
            self._is_stopped.wait()
            os.close(self._stop_fd)

    def _watch(self, listener: NoticeListener) -> None:
        failures = 0
        while not self._is_stopped.is_set():
            try:
                for sighting in self._look(self._stop_fd):
                    self._deliver(sighting, listener)
            except LookError as error:
                failures += 1
                if failures == 1:
                    _logger.warning("notices from %s: %s; will go on trying", self._name, error)
                self._is_stopped.wait(min(self._period_s * 2**failures, _BACKOFF_MAX_S))
                continue
            if failures:
                _logger.info("notices from %s: answers again", self._name)
            failures = 0
            self._is_stopped.wait(self._period_s)

    def _deliver(self, sighting: Sighting, listener: NoticeListener) -> None:
        if sighting.key not in self._delivered:
            self._delivered.add(sighting.key)
            listener(sighting.notice)
