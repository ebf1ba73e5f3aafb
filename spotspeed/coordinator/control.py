"""The control thread of a rank: it alone owns the transport, and it drives the cut machine.

It sleeps in poll() on sockets, signals and an eventfd, and so costs nothing while nothing happens.
The machine is shared with the main thread under one condition's lock, which is held for a few
instructions by the gate and never while anything blocks or a listener is called.
"""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from spotspeed import events
from spotspeed.coordinator.post import Post
from spotspeed.coordinator.signals import SignalListener
from spotspeed.coordinator.transport import PeerDown, Received, Transport
from spotspeed.core.cut import CutMachine
from spotspeed.core.cut_actions import (
    Action,
    AllClosed,
    Capture,
    Decided,
    Departed,
    Exchanged,
    PeerLost,
    Send,
    Settled,
)
from spotspeed.core.cut_messages import Cut, Wish
from spotspeed.errors import FormatError

STEP_BITS = 40
STEP_MASK = (1 << STEP_BITS) - 1
"""A position is generation << STEP_BITS | step; every load of a state begins a generation."""
IDLE_S = 60.0
SHORTEST_GRACE_S = 0.2
LOSS_GRACE_S = 0.5
"""With a lost rank the main thread is in a dead collective, or will be."""

Command = Callable[[float], Sequence[Action]]


class CutListener(Protocol):
    """Told on the control thread what the ranks agree on; every method must return at once."""

    def on_notice(self, source: str, seconds_left: float) -> None:
        """This rank was told to stop; all ranks will agree on a step."""
        ...

    def on_capture(self, cut: Cut) -> None:
        """The state is that of `cut.step`, and stays so until `report_staged(cut.round)`.

        Before `start` the step is -1: nothing has been trained or restored yet.

        Must lead to `report_staged` and `report_durable`, or to `report_failed`, from any thread.
        Several captures may be open, also of one step: one save may answer both.
        """
        ...

    def on_outcome(self, cut: Cut, digest: str | None, why: str) -> None:
        """The round is over: sealed under `digest`, or None: not known durable, because of `why`.

        None before this rank has reported staged: forget the copy before returning, for the state
        changes as soon as this returns. None after that: the savers may still seal it.
        """
        ...

    def on_peer_lost(self, rank: int, why: str) -> None:
        """A rank is gone; a stopping round among the survivors follows."""
        ...

    def leave(self, why: str) -> None:
        """End the process now: all may leave, and the main thread is not at the gate in time."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """One source of notices by signal, and what a signal of it means."""

    signals: SignalListener
    seconds_left: float


class Control:
    """Machine, transport and thread of one rank.

    `lock` guards `machine` and the public fields; `mutex` is what it locks, for those who neither
    wait nor notify, at a third of the cost.
    """

    def __init__(
        self, transport: Transport, machine: CutMachine, listener: CutListener,
        *, source: Source | None, grace_s: float,
    ) -> None:  # fmt: skip
        self.machine = machine
        self.mutex = threading.Lock()
        self.lock = threading.Condition(self.mutex)
        self.departed: Departed | None = None
        self.is_closed = self.is_over = self.has_reached = False
        self.exchanged: dict[int, Exchanged] = {}
        self._transport = transport
        self._post = Post(transport)
        self._listener = listener
        self._source = source
        self._grace_s = grace_s
        self._leave_at: float | None = None
        self._jobs: deque[Callable[[], None]] = deque()
        self._heard_at: float | None = None
        self._drain_s = 0.0
        self._wakeup_lock = threading.Lock()
        self._wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_running = True
        self._thread = threading.Thread(target=self._run, name="spotspeed-control", daemon=True)
        self._thread.start()

    # From any thread.

    def command(self, command: Command) -> None:
        """Let the control thread call `command(now)` on the machine and act on what it returns."""
        self._do(lambda: self._apply(command))

    def notice(self, source: str, seconds_left: float, wish: Wish) -> None:
        """A wish of this rank; a stop is told to the listener first."""
        self._do(lambda: self._notice(source, seconds_left, wish))

    def wake(self) -> None:
        """Let the control thread look at its times again."""
        with self._wakeup_lock:
            if not self.is_over:
                os.eventfd_write(self._wakeup_fd, 1)

    def stop(self, drain_s: float) -> None:
        """End the thread and close the transport; whatever is not agreed stays so. Idempotent."""
        if threading.current_thread() is self._thread or self.is_over:
            return
        self._drain_s = drain_s
        self._is_running = False
        self.wake()
        self._thread.join()

    def _do(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        self.wake()

    # The thread.

    def _run(self) -> None:
        try:
            poller = select.poll()
            poller.register(self._wakeup_fd, select.POLLIN)
            poller.register(self._transport.fileno(), select.POLLIN)
            if self._source is not None:
                poller.register(self._source.signals.fileno(), select.POLLIN)
            while self._is_running:
                ready = {fd for fd, _ in poller.poll(math.ceil(self._wait_s() * 1000))}
                if self._wakeup_fd in ready:
                    os.eventfd_read(self._wakeup_fd)
                self._turn()
        finally:
            self._end()

    def _turn(self) -> None:
        self._hear()
        for event in self._transport.handle():
            if isinstance(event, Received):
                self._receive(event)
            else:
                self._peer_down(event)
        while self._jobs:
            self._jobs.popleft()()
        self._apply(self.machine.tick)
        if self._leave_at is not None and time.monotonic() >= self._leave_at:
            self._leave_at = None
            self._leave()

    def _wait_s(self) -> float:
        now = time.monotonic()
        with self.lock:
            wake = self.machine.wake()
        times = [self._transport.wait_s(), IDLE_S]
        times += [end - now for end in (wake, self._leave_at) if end is not None]
        return max(0.0, min(times)) if not self._jobs else 0.0

    def _end(self) -> None:
        """Whoever waits is woken, also when this thread ends by an error (threading prints it)."""
        with self.lock, self._wakeup_lock:
            self.is_over = True
            os.close(self._wakeup_fd)
            self.lock.notify_all()
        self._transport.close(drain_s=self._drain_s)

    # What comes in.

    def _hear(self) -> None:
        if self._source is None:
            return
        for number in self._source.signals.drain():
            name = signal.Signals(number).name
            self._notice(name, self._source.seconds_left, Wish.STOP)

    def _notice(self, source: str, seconds_left: float, wish: Wish) -> None:
        if wish is Wish.STOP:
            self._heard_at = self._heard_at or time.monotonic()
            self._tell(lambda: self._listener.on_notice(source, seconds_left))
        self._apply(lambda now: self.machine.notice(wish, seconds_left, source, now))

    def _receive(self, event: Received) -> None:
        try:
            found = self._post.receive(event.sender, event.payload)
        except FormatError as error:
            self._peer_down(PeerDown(event.sender, str(error)))
            return
        if found is not None:
            term, message = found
            self._apply(lambda now: self.machine.receive(event.sender, term, message, now))

    def _peer_down(self, event: PeerDown) -> None:
        self._apply(lambda now: self.machine.peer_down(event.rank, event.why, now))

    # What goes out.

    def _apply(self, command: Command) -> None:
        with self.lock:
            actions = command(time.monotonic())
            self.lock.notify_all()
        for action in actions:
            self._perform(action)

    def _perform(self, action: Action) -> None:
        if isinstance(action, Send):
            self._post.send(action.to, action.term, action.message)
        elif isinstance(action, Capture):
            self._capture(action.cut)
        elif isinstance(action, Settled):
            self._settle(action)
        elif isinstance(action, Decided):
            self._tell_agreed(action.cut)
        elif isinstance(action, PeerLost):
            rank, why = action.rank, action.why
            self._tell(lambda: self._listener.on_peer_lost(rank, why))
        else:
            self._tell_waiting(action)

    def _capture(self, cut: Cut) -> None:
        failure = self._tell(lambda: self._listener.on_capture(public(cut)))
        if failure is not None:
            self._apply(lambda now: self.machine.failed(cut.round, failure, now))

    def _settle(self, action: Settled) -> None:
        cut = action.cut
        self._tell(lambda: self._listener.on_outcome(public(cut), action.digest, action.why))
        self._apply(lambda now: self.machine.delivered(cut.round, now))

    def _end_of_grace(self) -> float:
        """When the main thread must be at the gate: soon, and sooner when there is no time left."""
        now, deadline = time.monotonic(), self.machine.member.deadline()
        grace_s = LOSS_GRACE_S if self.machine.lost else self._grace_s
        if deadline is None:
            return now + grace_s
        return min(now + grace_s, max(now + SHORTEST_GRACE_S, deadline))

    def _leave(self) -> None:
        """The grace is over: the main thread is somewhere else, in a dead collective perhaps."""
        if not self.has_reached and self.departed is not None:
            why = self.departed.why or "all ranks leave"
            self._tell(lambda: self._listener.leave(why))
            with self.lock:
                self.has_reached = True
                self.lock.notify_all()

    def _tell(self, call: Callable[[], None]) -> str | None:
        """Call the listener; what it raises must not end the agreement of all ranks."""
        try:
            call()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            events.emit(events.Lost("what the ranks agreed on, for a listener failed", failure))
            return failure
        return None

    def _tell_agreed(self, cut: Cut) -> None:
        latency_s = time.monotonic() - self._heard_at if self._heard_at is not None else 0.0
        agreed = events.Agreed(cut.step & STEP_MASK, cut.round, cut.stop, latency_s)
        self._tell(lambda: events.emit(agreed))
        self._heard_at = None

    def _tell_waiting(self, action: Departed | AllClosed | Exchanged) -> None:
        with self.lock:
            if isinstance(action, Departed):
                self.departed = action
                self._leave_at = self._end_of_grace()
            elif isinstance(action, AllClosed):
                self.is_closed = True
            else:
                self.exchanged = {action.serial: action}
            self.lock.notify_all()


def public(cut: Cut) -> Cut:
    """`cut` with the optimizer step instead of the position; -1 before `start`."""
    return replace(cut, step=cut.step & STEP_MASK if cut.step > STEP_MASK else -1)
