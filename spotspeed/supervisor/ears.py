"""What the supervisor itself is told: signals, taken one at a time, and its own host's notices."""

from __future__ import annotations

import queue
import signal
import time
from collections.abc import Callable
from types import TracebackType

from spotspeed.config import NoticeConfig
from spotspeed.coordinator.notice import Notice, NoticeSource, configured_sources

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT,
           signal.SIGTSTP)  # fmt: skip
CALLS = (signal.SIGTERM, signal.SIGINT)
"""Signals by which a person or a scheduler says it again."""
_TICK_S = 0.2


class Ears:
    """Takes signals of the calling thread's process while entered; use it on the main thread.

    Signals that were ignored before (nohup) stay ignored. `heard` says what told the supervisor
    to leave, None so far; `is_urgent` after a Ctrl-C when that was already known, and after
    Ctrl-\\. `calls` counts SIGTERM and SIGINT. Ctrl-Z does not stop the supervisor, and `say`
    gets why: the job, in a session of its own, would go on with nobody to hear its notices; and
    ranks that are stopped as well take each other for lost.
    """

    def __init__(self, say: Callable[[str], None], *, watch_host: bool = True) -> None:
        self.heard: str | None = None
        self.is_urgent = False
        self.calls = 0
        self.seconds_left: float | None = None
        self.mask: set[int] = set()
        """The signal mask that children shall have."""
        self._say, self._watch_host = say, watch_host
        self._taken = {n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
        self._notices: queue.SimpleQueue[Notice] = queue.SimpleQueue()
        self._sources: list[NoticeSource] = []

    def __enter__(self) -> Ears:
        blocked = {*self._taken, signal.SIGCHLD}
        self.mask = {int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, blocked)}
        if self._watch_host:
            self._sources = configured_sources(NoticeConfig())
            for source in self._sources:
                source.start(self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for source in self._sources:
            source.stop()
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)

    def _hear(self, notice: Notice) -> None:
        self._notices.put(notice)

    def listen(self, tick_s: float = _TICK_S) -> None:
        """Return after a signal, the end of a child among them, or `tick_s`."""
        taken = signal.sigtimedwait({*self._taken, signal.SIGCHLD}, tick_s)
        if taken is not None and taken.si_signo != signal.SIGCHLD:
            self._take(signal.Signals(taken.si_signo))
        while not self._notices.empty():
            notice = self._notices.get()
            if notice.stop:
                self.heard = self.heard or notice.source
                self.seconds_left = notice.seconds_left

    def _take(self, number: signal.Signals) -> None:
        if number == signal.SIGTSTP:
            self._say("not stopped: the job would train on unwatched; Ctrl-C ends it")
            return
        self.calls += number in CALLS
        is_again = self.heard is not None and number == signal.SIGINT
        self.is_urgent = self.is_urgent or is_again or number == signal.SIGQUIT
        self.heard = self.heard or number.name

    def wait(self, seconds: float) -> bool:
        """Listen for so long; False as soon as it is time to leave."""
        end = time.monotonic() + seconds
        while self.heard is None and time.monotonic() < end:
            self.listen()
        return self.heard is None
