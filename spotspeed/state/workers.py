"""DataLoader workers that outlive the signals of an interruption and obey their parent alone.

Launchers send SIGTERM, and forward other signals, to whole process groups. A worker that dies of
one takes its rank with it ("DataLoader worker is killed by signal") before anything is saved; a
worker that ignores SIGTERM hangs the exit of a parent with persistent workers, which terminates and
joins them. So the signals are blocked in the worker and a thread takes them with sigwaitinfo: it
ends the process when the parent sent SIGTERM, and drops everything else. A parent that dies is
noticed by torch's own watchdog.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

DEFAULT_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")
"""What a worker is kept from dying of: the default notices, and what launchers forward."""


@dataclass(frozen=True, slots=True)
class WorkerInit:
    """A `worker_init_fn` that protects the worker, then calls `then`, the user's own one.

    `signals` are names; SIGTERM is always among them. Picklable when `then` is.
    """

    signals: tuple[str, ...] = DEFAULT_SIGNALS
    then: Callable[[int], None] | None = None

    def __call__(self, worker_id: int) -> None:
        """Called by torch in the worker, before its first sample."""
        protect(self.signals)
        if self.then is not None:
            self.then(worker_id)


worker_init_fn = WorkerInit()
"""For a DataLoader of your own: `DataLoader(..., worker_init_fn=spotspeed.worker_init_fn)`."""


def protect(signals: tuple[str, ...] = DEFAULT_SIGNALS) -> None:
    """Block `signals` and SIGTERM in this process and start the thread that takes them.

    To be called on the main thread before other threads start: they inherit the mask.
    """
    taken = _numbers(signals)
    signal.pthread_sigmask(signal.SIG_BLOCK, taken)
    threading.Thread(
        target=_obey_parent, args=(taken,), name="spotspeed-signals", daemon=True
    ).start()


@contextmanager
def held_back(signals: tuple[str, ...] = DEFAULT_SIGNALS) -> Iterator[None]:
    """Start processes inside: they begin with `signals` blocked, so no signal finds them bare.

    Signals to this thread wait until the block ends; the process is told by its other threads.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _numbers(signals))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _numbers(signals: tuple[str, ...]) -> set[signal.Signals]:
    return {signal.SIGTERM, *(signal.Signals[name] for name in signals)}


def _obey_parent(taken: set[signal.Signals]) -> None:
    while True:
        info = signal.sigwaitinfo(taken)
        if info.si_signo == signal.SIGTERM and info.si_pid == os.getppid():
            # As torch's own handler does; the parent's SIGCHLD handler takes 0 for an orderly end.
            os._exit(0)
