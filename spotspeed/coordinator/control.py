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
from typing import Protocol

from spotspeed.coordinator.listener import CutListener, Source, Teller
from spotspeed.coordinator.post import Post
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
from spotspeed.core.cut_gate import OPEN
from spotspeed.core.cut_messages import Wish
from spotspeed.errors import FormatError

IDLE_S = 60.0
SHORTEST_GRACE_S = 0.2
LOSS_GRACE_S = 0.5
"""With a lost rank the main thread is in a dead collective, or will be."""

Command = Callable[[float], Sequence[Action]]


class ControlThread(Protocol):
    """What the coordinator needs of a control thread, in Python or native.

    `lock` is notified after everything that somebody may wait for; the fields change under it.
    Methods belong to any thread.
    """

    lock: threading.Condition
    departed: Departed | None
    is_closed: bool
    is_over: bool
    exchanged: dict[int, Exchanged]

    def pass_gate(self, position: int) -> bool:
        """The fast way: whether update `position` may begin; it has then begun."""
        ...

    def enter(self, position: int) -> bool:
        """The same for one who waits, with `lock` held."""
        ...

    def completed(self, position: int) -> None:
        """Update `position` is done."""
        ...

    def notice(self, source: str, seconds_left: float | None, wish: Wish) -> None:
        """A wish of this rank; of a stop the listener is told first."""
        ...

    def staged(self, number: int) -> None:
        """The state of that round is out of the training's memory."""
        ...

    def durable(self, number: int, digest: str | None) -> None:
        """This rank's part is durable."""
        ...

    def failed(self, number: int, why: str) -> None:
        """This rank's part will not become durable."""
        ...

    def gather(self, label: str, value: bytes) -> None:
        """Begin the next exchange; the first has serial 1. Its end goes to `exchanged`."""
        ...

    def missing(self) -> tuple[int, ...]:
        """Ranks that are known not to have joined the running exchange."""
        ...

    def has_lost(self) -> bool:
        """Whether a rank is lost."""
        ...

    def is_ending(self) -> bool:
        """Whether a rank is lost or a stop is decided."""
        ...

    def reached(self) -> None:
        """The main thread knows that it is to leave."""
        ...

    def wake(self) -> None:
        """Let the thread look at its times again."""
        ...

    def stop(self, drain_s: float) -> None:
        """End the thread and close the transport; whatever is not agreed stays so. Idempotent."""
        ...


class Control:
    """Machine, transport and thread of one rank, in Python: the readable `ControlThread`.

    `lock` guards the machine, too. The native twin is csrc/control.cpp.
    """

    def __init__(
        self, transport: Transport, machine: CutMachine, listener: CutListener,
        *, source: Source | None, grace_s: float,
    ) -> None:  # fmt: skip
        self._mutex = threading.Lock()
        self.lock = threading.Condition(self._mutex)
        self.departed: Departed | None = None
        self.is_closed = self.is_over = False
        self.exchanged: dict[int, Exchanged] = {}
        self._machine = machine
        self._gate = machine.gate
        self._has_reached = False
        self._transport = transport
        self._post = Post(transport)
        self._teller = Teller(listener, failed=self._fail, delivered=self._deliver)
        self._source = source
        self._grace_s = grace_s
        self._leave_at: float | None = None
        self._jobs: deque[Callable[[], None]] = deque()
        self._drain_s = 0.0
        self._wakeup_lock = threading.Lock()
        self._wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_running = True
        self._thread = threading.Thread(target=self._run, name="spotspeed-control", daemon=True)
        self._thread.start()

    # From any thread.

    def pass_gate(self, position: int) -> bool:
        gate = self._gate
        # Neither waits nor notifies: the bare lock, at a third of the cost.
        with self._mutex:
            if position <= gate.ceiling:
                gate.started = position
                return True
        return False

    def enter(self, position: int) -> bool:
        return self._machine.enter(position, time.monotonic())

    def completed(self, position: int) -> None:
        with self._mutex:
            self._gate.completed = position
            is_watched = self._gate.ceiling != OPEN
        if is_watched:
            self._command(lambda now: self._machine.completed(position, now))

    def notice(self, source: str, seconds_left: float | None, wish: Wish) -> None:
        self._do(lambda: self._notice(source, seconds_left, wish))

    def staged(self, number: int) -> None:
        self._command(lambda now: self._machine.staged(number, now))

    def durable(self, number: int, digest: str | None) -> None:
        self._command(lambda now: self._machine.durable(number, digest, now))

    def failed(self, number: int, why: str) -> None:
        self._command(lambda now: self._machine.failed(number, why, now))

    def gather(self, label: str, value: bytes) -> None:
        self._command(lambda now: self._machine.gather(label, value, now)[1])

    def missing(self) -> tuple[int, ...]:
        return self._machine.missing()

    def has_lost(self) -> bool:
        return bool(self._machine.lost)

    def is_ending(self) -> bool:
        rounds = self._machine.member.rounds.values()
        return bool(self._machine.lost) or any(held.cut.stop for held in tuple(rounds))

    def reached(self) -> None:
        self._has_reached = True

    def wake(self) -> None:
        with self._wakeup_lock:
            if not self.is_over:
                os.eventfd_write(self._wakeup_fd, 1)

    def stop(self, drain_s: float) -> None:
        if threading.current_thread() is self._thread or self.is_over:
            return
        self._drain_s = drain_s
        self._is_running = False
        self.wake()
        self._thread.join()

    def _command(self, command: Command) -> None:
        """Let the thread call `command(now)` on the machine and act on what it returns."""
        self._do(lambda: self._apply(command))

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
        self._apply(self._machine.tick)
        if self._leave_at is not None and time.monotonic() >= self._leave_at:
            self._leave_at = None
            self._leave()

    def _wait_s(self) -> float:
        now = time.monotonic()
        with self.lock:
            wake = self._machine.wake()
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

    def _notice(self, source: str, seconds_left: float | None, wish: Wish) -> None:
        if wish is Wish.STOP:
            self._teller.notice(source, seconds_left or 0.0, time.monotonic())
        self._apply(lambda now: self._machine.notice(wish, seconds_left, source, now))

    def _receive(self, event: Received) -> None:
        try:
            found = self._post.receive(event.sender, event.payload)
        except FormatError as error:
            self._peer_down(PeerDown(event.sender, str(error)))
            return
        if found is not None:
            term, message = found
            self._apply(lambda now: self._machine.receive(event.sender, term, message, now))

    def _peer_down(self, event: PeerDown) -> None:
        self._apply(lambda now: self._machine.peer_down(event.rank, event.why, now))

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
            self._teller.capture(action.cut)
        elif isinstance(action, Settled):
            self._teller.settle(action.cut, action.digest, action.why)
        elif isinstance(action, Decided):
            self._teller.agreed(action.cut, time.monotonic())
        elif isinstance(action, PeerLost):
            self._teller.peer_lost(action.rank, action.why)
        else:
            self._tell_waiting(action)

    def _fail(self, number: int, why: str) -> None:
        self._apply(lambda now: self._machine.failed(number, why, now))

    def _deliver(self, number: int) -> None:
        self._apply(lambda now: self._machine.delivered(number, now))

    def _end_of_grace(self) -> float:
        """When the main thread must be at the gate: soon, and sooner when there is no time left."""
        now, deadline = time.monotonic(), self._machine.member.deadline()
        grace_s = LOSS_GRACE_S if self._machine.lost else self._grace_s
        if deadline is None:
            return now + grace_s
        return min(now + grace_s, max(now + SHORTEST_GRACE_S, deadline))

    def _leave(self) -> None:
        """The grace is over: the main thread is somewhere else, in a dead collective perhaps."""
        if not self._has_reached and self.departed is not None:
            self._teller.leave(self.departed.why)
            with self.lock:
                self._has_reached = True
                self.lock.notify_all()

    def _tell_waiting(self, action: Departed | AllClosed | Exchanged) -> None:
        with self.lock:
            if isinstance(action, Departed):
                self.departed = action
                self._leave_at = self._end_of_grace()
            elif isinstance(action, AllClosed):
                self.is_closed = True
            else:
                self.exchanged = action.join(self.exchanged)
            self.lock.notify_all()
