"""How a training process ends: exit codes, the unhandled error, and the close that nobody called.

Exit codes: 0 done; 75 interrupted and durable, requeue me; 76 interrupted, and the notice's
checkpoint was not known durable; 77 do not requeue.
"""

from __future__ import annotations

import atexit
import dis
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

from spotspeed.errors import (
    ConfigError,
    CoordinationError,
    LeavingError,
    OwnedError,
    ReshardError,
    SpotSpeedError,
)
from spotspeed.supervised import tell

EXIT_DURABLE = 75
EXIT_NOT_DURABLE = 76
EXIT_DO_NOT_REQUEUE = 77
NO_REQUEUE_ERRORS = (ConfigError, OwnedError, ReshardError)
REQUEUE_ERRORS = (CoordinationError,)
"""Other ranks are gone, or a notice came before there was anything to save."""
LOSS_ERRORS = (RuntimeError, OSError, CoordinationError)
"""What a rank sees when another is gone: libraries raise these out of a collective."""
COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
"""Where collectives are called from."""
_RETURNS = frozenset(op for name, op in dis.opmap.items() if name.startswith("RETURN_"))


class UnknownExit(SystemExit):
    """`raise SystemExit` or `exit()`, of which no hook hears: what code it gave is not known."""


class ExitWatch:
    """Watches the main thread: calls `close` when it has ended.

    `close` is told by what: None for the end of the script, SystemExit with its code or
    UnknownExit, or the unhandled error.

    A thread that is not a daemon waits for the main thread, so that threads, sockets and futures
    still work while it closes (they do not in `atexit` handlers). An unhandled error is printed as
    ever; then the process leaves with the code that fits it.
    """

    def __init__(self, close: Callable[[BaseException | None], None]) -> None:
        self._close = close
        self._error: BaseException | None = None
        self._expected: int | None = None
        self._is_disarmed = self._is_told = False
        self._previous_hook = sys.excepthook
        sys.excepthook = self._on_unhandled
        self._previous_exit = sys.exit
        sys.exit = self._on_exit
        self._outermost = _outermost_frame()
        self._thread = threading.Thread(target=self._wait, name="spotspeed-exit", daemon=False)
        self._thread.start()

    def expect(self, code: int) -> None:
        """The ranks are leaving: an error that this causes in the main thread ends with `code`."""
        self._expected = code

    def within(self, seconds: float, code: int) -> None:
        """End the process with `code` after so long, whatever hangs then."""

        def end() -> None:
            time.sleep(seconds)
            self.now(code)

        threading.Thread(target=end, name="spotspeed-last", daemon=True).start()

    def disarm(self) -> None:
        """Nothing is left to close."""
        self._is_disarmed = True
        tell(closed=True)
        if sys.excepthook == self._on_unhandled:
            sys.excepthook = self._previous_hook
        if sys.exit == self._on_exit:
            sys.exit = self._previous_exit

    def hasten(self, code: int) -> None:
        """Once the main thread has ended, run what others want to be run at exit, and be gone.

        To take an interpreter with torch apart takes seconds, of those that the machine has left.
        """
        tell(code=code)
        atexit.register(self._end, code)

    def now(self, code: int) -> None:
        """End the process without waiting for the main thread."""
        leave_now(code)

    def _end(self, code: int) -> None:
        """The last one to be registered is called first, and calls the others."""
        atexit.unregister(self._end)
        try:
            atexit._run_exitfuncs()
        finally:
            self.now(code)

    def _wait(self) -> None:
        threading.main_thread().join()
        if self._is_disarmed:
            return
        try:
            self._error = self._end_of(self._error)
            if not isinstance(self._error, LOSS_ERRORS):
                self._tell_error()
            self._close(self._error)
            self._tell_error()
            code = _code_of(self._error) if self._expected is None else self._expected
            if code is not None:
                self.now(code)
        except Exception:  # the last thing this process does: report it and leave with a code
            traceback.print_exc()
            self.now(EXIT_NOT_DURABLE)

    def _tell_error(self) -> None:
        """Tell once that the script has failed by itself: a new start would not cure it."""
        error = self._error
        if error is None or self._expected is not None or self._is_told:
            return
        if is_of_script(error):
            self._is_told = True
            tell(error=type(error).__name__)

    def _end_of(self, error: BaseException | None) -> BaseException | None:
        """What ended the main thread, where no hook was told: only its frame knows."""
        if self._outermost is None or not isinstance(error, SystemExit | None):
            return error
        code, at = self._outermost.f_code.co_code, self._outermost.f_lasti
        if code[at] in _RETURNS:
            return None  # A `sys.exit` was caught.
        return UnknownExit() if error is None else error

    def _on_exit(self, status: Any = None, /) -> NoReturn:
        """`sys.exit`, of which no other hook hears."""
        if threading.current_thread() is threading.main_thread():
            self._error = SystemExit(status)
        self._previous_exit(status)

    def _on_unhandled(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self._error = error
        if not issubclass(kind, LeavingError):
            self._previous_hook(kind, error, trace)
        code = _code_of(error) if self._expected is None else self._expected
        if code is not None and not issubclass(kind, LOSS_ERRORS):
            self.now(code)


def is_of_script(error: BaseException) -> bool:
    """Whether `error` comes from the script itself, not from a rank or a host that is gone.

    Where a collective has raised it, nobody knows: other ranks may be gone without a word so far.
    """
    kind = type(error)
    if isinstance(error, SystemExit):
        is_ours = error.code in (EXIT_DURABLE, EXIT_NOT_DURABLE, EXIT_DO_NOT_REQUEUE)
        return has_failed(error) and not is_ours
    if _code_of(error) is not None or isinstance(error, (ConnectionError, TimeoutError)):
        return False
    if not isinstance(error, LOSS_ERRORS):
        return True
    frames = traceback.walk_tb(error.__traceback__)
    is_collective = any(is_of_collectives(frame.f_code.co_filename) for frame, _ in frames)
    return not is_collective and not kind.__module__.startswith("mpi4py")


def is_of_collectives(file: str) -> bool:
    """Whether this file of code calls collectives."""
    return any(place in file.replace(os.sep, "/") for place in COLLECTIVES)


def leave_now(code: int) -> None:
    """End the process, with what it has written and without what it has registered."""
    tell(code=code)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(code)


def has_failed(error: BaseException | None) -> bool:
    """Whether a script that has ended by `error` has said that something is wrong."""
    is_unknown = error is None or isinstance(error, UnknownExit)
    return not is_unknown and getattr(error, "code", error) not in (None, 0)


def _outermost_frame() -> FrameType | None:
    """Of the main thread, if that is the one that asks."""
    frame: FrameType | None = None
    if threading.current_thread() is threading.main_thread():
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
    return frame


def watch_refusals() -> None:
    """From now on an unhandled error ends the process with the code that fits it: 76 or 77."""
    if not isinstance(sys.excepthook, _RefusalHook):
        sys.excepthook = _RefusalHook(sys.excepthook)


class _RefusalHook:
    """Reports an unhandled error as ever; then leaves with the code that fits it."""

    def __init__(self, previous: Callable[..., None]) -> None:
        self._previous = previous

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self._previous(kind, error, trace)
        code = _code_of(error)
        if code is not None:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            tell(code=code)
            os._exit(code)


def _code_of(error: BaseException | None) -> int | None:
    """The exit code that tells a scheduler what an unhandled error of ours means for it.

    None where there is another of the script behind it, in whose wake it was raised.
    """
    if isinstance(error, NO_REQUEUE_ERRORS):
        return EXIT_DO_NOT_REQUEUE
    if not isinstance(error, REQUEUE_ERRORS):
        return None
    first: BaseException = error
    while first.__context__ is not None:
        first = first.__context__
    is_ours = isinstance(first, (SpotSpeedError, *LOSS_ERRORS)) or _is_from_here(first)
    return EXIT_NOT_DURABLE if is_ours else None


def _is_from_here(error: BaseException) -> bool:
    """Whether code of this package itself has raised `error`."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(files) and files[-1].startswith(os.path.dirname(os.path.abspath(__file__)) + os.sep)
