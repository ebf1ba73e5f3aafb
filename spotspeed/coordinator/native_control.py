"""The native control thread, and the Python thread that does what it cannot: capture and report.

csrc/control.h hears signals, agrees and beats without the GIL; what the listener has to know it
hands to a thread of Python, which sleeps in poll() until then.
"""

from __future__ import annotations

import select
import signal
import threading
import time
from typing import Any

from spotspeed import _native, events
from spotspeed.coordinator.forks import abandon_on_fork
from spotspeed.coordinator.listener import STEP_MASK, CutListener, Source, Teller
from spotspeed.coordinator.native_transport import NativeTransport
from spotspeed.core.cut_actions import (
    AllClosed,
    Capture,
    Decided,
    Departed,
    Exchanged,
    PeerLost,
    Settled,
    Timing,
)
from spotspeed.core.cut_messages import Cut, Wish
from spotspeed.core.cut_tuples import actions_of, timing_tuple

STUCK_S = 5.0
"""How long Python may take to hear that the process is to end before it is ended without."""


class NativeControl:
    """`ControlThread` without the GIL. Owns `transport` from now on."""

    def __init__(
        self, transport: NativeTransport, listener: CutListener, source: Source, timing: Timing,
        *, grace_s: float, durable_code: int,
    ) -> None:  # fmt: skip
        self.lock = threading.Condition(threading.Lock())
        self.departed: Departed | None = None
        self.is_closed = self.is_over = False
        self.exchanged: dict[int, Exchanged] = {}
        self._has_reached = self._is_abandoned = False
        self._source = source
        self._tap = source.signals.tap()
        names = {number: signal.Signals(number).name for number in source.signals.heard()}
        signals = (*(self._tap or (-1, -1)), names, source.seconds_left)
        self._native = _native.ControlThread(
            transport.hand_over(), timing_tuple(timing), time.time() - time.monotonic(), signals,
            (grace_s, STUCK_S), durable_code,
        )  # fmt: skip
        self._teller = Teller(
            listener, failed=self._native.failed, delivered=self._native.delivered
        )
        self.pass_gate = self._native.pass_gate
        self.enter = self._native.enter
        self.completed = self._native.completed
        self.staged = self._native.staged
        self.durable = self._native.durable
        self.failed = self._native.failed
        self.gather = self._native.gather
        self.has_lost = self._native.has_lost
        self.is_ending = self._native.is_ending
        self.wake = self._native.wake
        abandon_on_fork(self)
        self._thread = threading.Thread(target=self._run, name="spotspeed-control", daemon=True)
        self._thread.start()

    def notice(self, source: str, seconds_left: float | None, wish: Wish) -> None:
        self._native.notice(int(wish), seconds_left, source)

    def missing(self) -> tuple[int, ...]:
        return tuple(self._native.missing())

    def reached(self) -> None:
        self._has_reached = True
        self._native.reached()

    def stop(self, drain_s: float) -> None:
        if threading.current_thread() is self._thread or self._is_abandoned:
            return
        self._native.stop(drain_s)
        self._thread.join()
        if self._tap is not None:
            self._source.signals.untap()
            self._tap = None

    def abandon_in_child(self) -> None:
        """A forked child has neither of the threads."""
        self.is_over = self._is_abandoned = True
        self._native.abandon()

    # The thread of Python.

    def _run(self) -> None:
        try:
            poller = select.poll()
            poller.register(self._native.event_fd(), select.POLLIN)
            poller.register(self._source.signals.fileno(), select.POLLIN)
            while not self.is_over:
                poller.poll()
                self._pump_signals()
                for at_s, name, *fields in self._native.take():
                    self._hear(at_s, name, fields)
                with self.lock:
                    self.lock.notify_all()
        finally:
            # Whoever waits is woken, also when this thread ends by an error.
            with self.lock:
                self.is_over = True
                self.lock.notify_all()

    def _pump_signals(self) -> None:
        """Feed others that listen for signals; heard they were natively, unless others tap."""
        numbers = self._source.signals.drain()
        if self._tap is None:
            for number in numbers:
                name = signal.Signals(number).name
                self.notice(name, self._source.seconds_left, Wish.STOP)

    def _hear(self, at_s: float, name: str, fields: list[Any]) -> None:
        if name == "Noticed":
            self._teller.notice(fields[0], fields[1], at_s)
        elif name == "MustLeave":
            self._leave(fields[0])
        elif name == "Ended":
            if fields[0]:
                events.emit(events.Lost("the agreement with the other ranks", fields[0]))
            self.is_over = True
        else:
            self._act(actions_of([(name, *fields)])[0], at_s)

    def _act(self, action: Any, at_s: float) -> None:
        if isinstance(action, Capture):
            self._teller.capture(action.cut)
        elif isinstance(action, Settled):
            self._settle(action.cut, action.digest, action.why)
        elif isinstance(action, Decided):
            self._teller.agreed(action.cut, at_s)
        elif isinstance(action, PeerLost):
            self._teller.peer_lost(action.rank, action.why)
        else:
            with self.lock:
                if isinstance(action, Departed):
                    self.departed = action
                elif isinstance(action, AllClosed):
                    self.is_closed = True
                elif isinstance(action, Exchanged):
                    self.exchanged = action.join(self.exchanged)

    def _settle(self, cut: Cut, digest: str | None, why: str) -> None:
        if digest is not None:
            self._native.remember_newest(f"that of step {cut.step & STEP_MASK}")
        self._teller.settle(cut, digest, why)

    def _leave(self, why: str) -> None:
        if not self._has_reached:
            self._teller.leave(why)
            self.reached()
