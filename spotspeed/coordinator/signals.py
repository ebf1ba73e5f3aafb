"""Hears signals at once, even while the main thread is inside a collective.

A Python handler runs only when the main thread returns from native code, seconds later. The
interpreter's native handler, however, writes the signal's number to `signal.set_wakeup_fd` at once
and without the GIL, and a thread that polls the other end of that pipe hears it within a
millisecond. Both the descriptor and the handlers are process-wide, and others want them too, so:

- whoever had the wakeup descriptor before us is fed, handlers that were there are still called;
- a signal that was ignored before we came, or is native code's, is left alone and `unheard`;
- `rearm` takes back what was taken (asyncio's add_signal_handler, a later SIG_IGN or SIG_DFL);
- a forked child gets default handlers and no wakeup descriptor: its signals do not wake the parent;
- the last `close` puts back what was found.

Signals are latched, not counted: a burst of one signal may be heard once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Iterable
from types import FrameType
from typing import Any

from spotspeed.coordinator.forks import abandon_on_fork
from spotspeed.coordinator.sigaction import native_handler

_logger = logging.getLogger("spotspeed")

_NATIVE_CHECK_S = 2.0
_READ_BYTES = 1 << 16
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class SignalListener:
    """Latches `signals` of this process, from construction to `close`.

    Construct, `rearm` and `close` it on the main thread; elsewhere nothing is heard, `unheard` says
    why, and that is logged once. `fileno` and `drain` may be used by one other thread.
    """

    def __init__(self, signals: Iterable[int]) -> None:
        self._signals = tuple(dict.fromkeys(signal.Signals(number) for number in signals))
        self._pending: dict[int, None] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._event_fd, select.EPOLLIN)
        self.unheard: dict[int, str] = _wakeup.add(self, self._signals)
        for number, why in self.unheard.items():
            _logger.warning("%s is not listened to: %s", signal.Signals(number).name, why)
        if len(self.unheard) < len(self._signals):
            self._epoll.register(_wakeup.fileno(), select.EPOLLIN)
        abandon_on_fork(self)

    def fileno(self) -> int:
        """Polls readable when `drain` may have something to return; constant until `close`."""
        return self._epoll.fileno()

    def drain(self) -> list[int]:
        """The signals that came since the last call, each once, in the order of their arrival."""
        _wakeup.pump()
        with self._lock:
            if self._pending:
                os.eventfd_read(self._event_fd)
            heard, self._pending = list(self._pending), {}
        return heard

    def heard(self) -> list[int]:
        """The signals that this listener hears."""
        return [int(number) for number in self._signals if number not in self.unheard]

    def tap(self) -> tuple[int, int] | None:
        """Let another thread read the wakeup pipe, without Python, until `untap`.

        (descriptor to read, descriptor to write all of that to, for `drain`); None when nothing is
        heard or somebody else has tapped it.
        """
        return _wakeup.tap() if self.heard() else None

    def untap(self) -> None:
        """The thread that had tapped the pipe has ended."""
        _wakeup.untap()

    def follow(self, old: int, new: int) -> None:
        """The pump reads another descriptor from now on."""
        if self.heard() and not self._is_closed:
            self._epoll.unregister(old)
            self._epoll.register(new, select.EPOLLIN)

    def rearm(self) -> bool:
        """Take back what others took; cheap enough for every step.

        True when nothing had to be done. Off the main thread it does nothing and returns True.
        """
        return _wakeup.rearm()

    def close(self) -> None:
        """Stop to listen and restore what was found; idempotent.

        Nothing may poll `fileno` any more: the number may soon mean something else.
        """
        if not self._is_closed:
            self._is_closed = True
            _wakeup.remove(self)
            self._close_descriptors()

    def wants(self, number: int) -> bool:
        """Whether `number` is one of this listener's signals."""
        return number in self._signals

    def latch(self, number: int) -> None:
        """Called by the pump, on any listener's thread."""
        with self._lock:
            if self.wants(number) and number not in self.unheard and not self._is_closed:
                if not self._pending:
                    os.eventfd_write(self._event_fd, 1)
                self._pending[number] = None

    def abandon_in_child(self) -> None:
        """A forked child hears nothing through this listener."""
        self._lock = threading.Lock()
        if not self._is_closed:
            self._is_closed = True
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        self._epoll.close()
        os.close(self._event_fd)


class _Wakeup:
    """The process's wakeup descriptor and handlers, shared by all listeners.

    Lives as long as the module; armed while there is a listener. `_lock` guards the pipe and the
    listeners and is never taken by a signal handler.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[SignalListener] = []
        self._previous: dict[int, Any] = {}
        self._natives: dict[int, int | None] = {}
        self._checked_s = 0.0
        self._read_fd = self._write_fd = -1
        self._tapped: tuple[int, int] | None = None
        self._other: tuple[int, tuple[int, int]] | None = None
        self._masks = threading.local()
        abandon_on_fork(self)
        os.register_at_fork(
            before=self._block, after_in_parent=self._unblock, after_in_child=self._unblock
        )

    def fileno(self) -> int:
        return self._tapped[0] if self._tapped else self._read_fd

    def tap(self) -> tuple[int, int] | None:
        with self._lock:
            if self._tapped is not None or self._read_fd < 0:
                return None
            self._tapped = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            for listener in self._listeners:
                listener.follow(self._read_fd, self._tapped[0])
            return self._read_fd, self._tapped[1]

    def untap(self) -> None:
        self.pump()
        with self._lock:
            if self._tapped is None:
                return
            (old, written), self._tapped = self._tapped, None
            for listener in self._listeners:
                listener.follow(old, self._read_fd)
            os.close(old)
            os.close(written)

    def add(self, listener: SignalListener, signals: Iterable[signal.Signals]) -> dict[int, str]:
        if not _is_main_thread():
            return dict.fromkeys(signals, "the listener was not created on the main thread")
        if self._read_fd < 0:
            self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        unheard = {}
        for number in signals:
            if number not in self._previous:
                why = self._install(number)
                if why is not None:
                    unheard[int(number)] = why
        with self._lock:
            self._listeners.append(listener)
        self._take_wakeup()
        return unheard

    def remove(self, listener: SignalListener) -> None:
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)
            if self._listeners or self._read_fd < 0:
                return
        if not _is_main_thread():
            if threading.main_thread().is_alive():
                _logger.warning("signal handlers stay installed: closed off the main thread")
            return
        self._restore()

    def pump(self) -> None:
        """Move what the native handler wrote to the listeners, and on to who was there before."""
        with self._lock:
            try:
                numbers = os.read(self.fileno(), _READ_BYTES) if self._read_fd >= 0 else b""
            except BlockingIOError:
                return
            other = self._living_other()
            if other is not None and numbers:
                # It may be full or just gone: it then already knows, or no longer wants to.
                with contextlib.suppress(OSError):
                    os.write(other, numbers)
            for number in dict.fromkeys(numbers):
                for listener in self._listeners:
                    listener.latch(number)

    def rearm(self) -> bool:
        if not self._listeners or not _is_main_thread():
            return True
        is_intact = self._take_wakeup()
        for number in self._previous:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.SIG_IGN):
                signal.signal(number, self._on_signal)
                name = signal.Signals(number).name
                _logger.warning("%s had been set to its default or ignored: taken back", name)
                is_intact = False
        now_s = time.monotonic()
        if now_s - self._checked_s >= _NATIVE_CHECK_S:
            self._checked_s = now_s
            self._check_natives()
        return is_intact

    def abandon_in_child(self) -> None:
        self._lock = threading.Lock()
        self._listeners = []
        if self._read_fd >= 0:
            signal.set_wakeup_fd(-1)
            for number in self._previous:
                if signal.getsignal(number) == self._on_signal:
                    signal.signal(number, signal.SIG_DFL)
            for descriptor in (self._read_fd, self._write_fd, *(self._tapped or ())):
                os.close(descriptor)
        self._read_fd = self._write_fd = -1
        self._tapped = None
        self._other = None
        self._previous.clear()
        self._natives.clear()
        abandon_on_fork(self)

    def _block(self) -> None:
        # Until the child has let go of the pipe, a signal to it must not be written there.
        self._masks.found = signal.pthread_sigmask(signal.SIG_BLOCK, tuple(self._previous))

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.found)

    def _install(self, number: signal.Signals) -> str | None:
        previous = signal.getsignal(number)
        if previous is signal.SIG_IGN:
            return "it was ignored when the listener was created"
        if previous is None:
            return "a native library handles it"
        signal.signal(number, self._on_signal)
        self._previous[number] = previous
        self._natives[number] = native_handler(number)
        return None

    def _take_wakeup(self) -> bool:
        found = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        if found == self._write_fd:
            return True
        self._other = (found, _identity(found)) if found >= 0 else self._other
        return False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not any(listener.wants(number) for listener in self._listeners):
            self._act_as_if_absent(number, frame)
            return
        if self._write_fd >= 0 and not self._take_wakeup():
            with contextlib.suppress(BlockingIOError):
                os.write(self._write_fd, bytes([number]))
        previous = self._previous.get(number)
        if callable(previous) and previous not in _DEFAULTS:
            previous(number, frame)

    def _act_as_if_absent(self, number: int, frame: FrameType | None) -> None:
        # Nobody listens any more but the handlers could not be taken out: swallowing SIGTERM would
        # leave a process that cannot be ended.
        previous = self._previous.get(number, signal.SIG_DFL)
        if callable(previous):
            previous(number, frame)
        else:
            signal.signal(number, previous)
            os.kill(os.getpid(), number)

    def _check_natives(self) -> None:
        for number, expected in self._natives.items():
            found = native_handler(number)
            if found != expected:
                self._natives[number] = found
                name = signal.Signals(number).name
                _logger.warning(
                    "native code has installed a handler for %s: unless it calls ours, "
                    "notices by this signal are not heard", name,
                )  # fmt: skip

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, previous)
        other = self._living_other()
        found = signal.set_wakeup_fd(-1)
        if found not in (-1, self._write_fd):
            signal.set_wakeup_fd(found, warn_on_full_buffer=False)
        elif other is not None:
            signal.set_wakeup_fd(other, warn_on_full_buffer=False)
        with self._lock:
            os.close(self._read_fd)
            os.close(self._write_fd)
            self._read_fd = self._write_fd = -1
            self._other = None
            self._previous.clear()
            self._natives.clear()

    def _living_other(self) -> int | None:
        """The descriptor of who was there before, unless its number now means something else."""
        if self._other is None:
            return None
        descriptor, identity = self._other
        return descriptor if _identity(descriptor) == identity else None


def _identity(descriptor: int) -> tuple[int, int]:
    try:
        status = os.fstat(descriptor)
    except OSError:
        return (-1, -1)
    return (status.st_dev, status.st_ino)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


_wakeup = _Wakeup()
