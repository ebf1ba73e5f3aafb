"""The agreement of the ranks as the training sees it: a gate before every update, and an exchange.

    coordinator = Coordinator(transport, config, listener)
    coordinator.start(step)                              # the state is that of `step`
    if coordinator.gate(step + 1) is GateVerdict.LEAVE:  # immediately before the update
        ...                                              # saved and told; end the process
    ...                                                  # the update
    coordinator.completed(step + 1)                      # immediately after it
    coordinator.close(timeout_s)

The rule is in `spotspeed.core.cut`; what the ranks agree on is told to the `CutListener`.
"""

from __future__ import annotations

import signal
import threading
import time
from enum import Enum, auto

from spotspeed import events
from spotspeed.config import SpotSpeedConfig
from spotspeed.coordinator.control_choice import Ending, start_control
from spotspeed.coordinator.listener import STEP_BITS, STEP_MASK, CutListener, Source
from spotspeed.coordinator.post import ENCODED_BYTES_MAX
from spotspeed.coordinator.signals import SignalListener
from spotspeed.coordinator.transport import Transport
from spotspeed.core.cut_actions import Exchanged, Timing
from spotspeed.core.cut_gather import WITHDRAWN
from spotspeed.core.cut_messages import Cut, Wish
from spotspeed.errors import CoordinationError, CutTimeoutError, LeavingError, PeerLostError

__all__ = ["Coordinator", "Cut", "CutListener", "GateVerdict"]

EXCHANGE_TIMEOUT_S = 600.0
WITHDRAWAL_S = 5.0
"""How long a rank that gives an exchange up waits to hear that it is over for all."""
LEAVE_GRACE_S = 1.5
"""How long the main thread may take to the gate once all ranks may leave."""
REARM_S = 2.0
STALL_REPORT_S = 1.0
LOSS_SIGN_S = 0.5
"""How long a rank whose collective has failed waits for the news that another is gone."""
DRAIN_S = 1.0
SPENT_S = 1.0
"""A notice that leaves less says only that the machine may go at any moment, ..."""
ATTEMPT_S = 5.0
"""... and is given so long: whatever is saved before it goes is saved."""


class GateVerdict(Enum):
    """What the main thread is to do."""

    GO = auto()
    LEAVE = auto()


_GO = GateVerdict.GO


class Coordinator:
    """One rank's side. Owns `transport` from now on; listens for the configured signals.

    Construct it on the main thread: elsewhere no signals are heard. `start`, `gate` and `completed`
    belong to the thread that trains, `exchange` to one thread at a time, all else to any thread.
    """

    def __init__(
        self, transport: Transport, config: SpotSpeedConfig, listener: CutListener
    ) -> None:
        self._notice_s = config.notice.deadline_s
        self._world_size = transport.world_size
        peer_timeout_s = config.coordinator.peer_timeout_s
        now = time.monotonic()
        timing = Timing(max_hold_s=config.staging.max_hold_s, settle_s=peer_timeout_s,
                        after_loss_s=config.notice.deadline_s)  # fmt: skip
        self._signals = SignalListener([signal.Signals[name] for name in config.notice.signals])
        self._rearm_at = now + REARM_S
        self._generation = 0
        self._base = 0
        self._control = start_control(
            transport, listener, Source(self._signals, self._notice_s), timing,
            Ending(LEAVE_GRACE_S, config.on_interrupt.exit_code),
        )  # fmt: skip
        self._lock = self._control.lock
        self._pass_gate = self._control.pass_gate
        self._serial = 0
        self._exchange_lock = threading.Lock()

    # The training.

    def start(self, step: int) -> GateVerdict:
        """The state is now that of `step`: trained so far, or loaded. Every rank says so.

        Like a gate: waits while a save of the state before is still to be copied.
        """
        base = (self._generation + 1) << STEP_BITS
        verdict = self._pass(base + step)
        if verdict is GateVerdict.GO:
            self._generation += 1
            self._base = base
            self.completed(step)
        return verdict

    def gate(self, step: int) -> GateVerdict:
        """Whether update `step` may begin; it has then begun. Waits while the rule says wait.

        Raises CoordinationError when the agreement has ended without a verdict.
        """
        position = self._base + step
        return _GO if self._pass_gate(position) else self._pass(position)

    def completed(self, step: int) -> None:
        """Update `step` is done, and the small state at its exit is recorded."""
        self._control.completed(self._base + step)
        now = time.monotonic()
        if now >= self._rearm_at:
            self._rearm_at = now + REARM_S
            self._signals.rearm()

    # Wishes and reports.

    def notice(self, source: str, seconds_left: float | None, *, stop: bool = True) -> None:
        """This machine goes away in `seconds_left` (None: as configured); or only save (stop).

        With no time left it is tried all the same: the machine may stand a little longer.
        """
        left = self._notice_s if seconds_left is None else seconds_left
        left = left if left >= SPENT_S else ATTEMPT_S
        self._control.notice(source, left, Wish.STOP if stop else Wish.SNAP)

    def request_snapshot(self, source: str = "periodic") -> None:
        """Save a step of all ranks, soon, and go on; joins a save that is not captured yet."""
        self._control.notice(source, None, Wish.SNAP)

    def report_staged(self, round_number: int) -> None:
        """The state of that round is out of the training's memory."""
        self._control.staged(round_number)

    def report_durable(self, round_number: int, digest: str | None) -> None:
        """This rank's part is durable; `digest` of the sealed whole, or None: not seen sealed.

        The round is sealed when all ranks report and at least one has seen the seal.
        """
        self._control.durable(round_number, digest)

    def report_failed(self, round_number: int, why: str) -> None:
        """This rank's part of that round will not become durable."""
        self._control.failed(round_number, why)

    def exchange(
        self, label: str, value: bytes, timeout_s: float = EXCHANGE_TIMEOUT_S
    ) -> list[bytes]:
        """Everybody's `value` by rank; every rank calls it, with equal labels, in equal order.

        Raises CoordinationError naming ranks when one is missing after `timeout_s` or is elsewhere
        in the program, PeerLostError when one is gone, LeavingError when all leave. A rank that
        comes after others have given up gets their error.
        """
        if len(value) * self._world_size > ENCODED_BYTES_MAX // 2:
            raise CoordinationError(
                f"exchange {label!r}: {len(value)} bytes for each of {self._world_size} ranks; "
                f"at most {ENCODED_BYTES_MAX // 2} together"
            )
        with self._exchange_lock:
            return self._exchange(label, value, timeout_s)

    def close(self, timeout_s: float) -> GateVerdict:
        """Stay until all ranks have closed: a late notice still saves the last step. Idempotent.

        LEAVE when such a notice was served. Raises CutTimeoutError when other ranks do not come in
        time; with `timeout_s` 0 nobody is waited for, and a rank that goes on loses this one.
        """
        control = self._control
        verdict = GateVerdict.GO
        try:
            if timeout_s > 0 and not control.is_over:
                verdict = self._wait_closed(timeout_s)
        finally:
            control.stop(DRAIN_S if timeout_s > 0 else 0.0)
            self._signals.close()
        return verdict

    def desert(self) -> None:
        """Go at once, whoever waits: the others lose this rank, and waits of this one fail."""
        self._control.stop(0.0)

    def await_departure(self, timeout_s: float) -> bool:
        """For a rank that trains no more: whether all leave, and this one may, too.

        Waits for the news of a lost rank or a notice, and with one up to `timeout_s` in all.
        """
        control, began = self._control, time.monotonic()
        with self._lock:
            while control.departed is None and not control.is_over:
                is_ending = control.is_ending()
                left = began + (timeout_s if is_ending else LOSS_SIGN_S) - time.monotonic()
                if left <= 0:
                    break
                self._lock.wait(left)
            if control.departed is None:
                return control.has_lost()
            control.reached()
            return True

    # Inside.

    def _pass(self, position: int) -> GateVerdict:
        """The slow way through the gate."""
        control, began = self._control, time.monotonic()
        is_told = False
        with self._lock:
            while not control.enter(position):
                if control.departed is not None:
                    control.reached()
                    return GateVerdict.LEAVE
                self._check_alive()
                if not is_told:
                    # Once: it is woken to see that somebody waits, and wakes whoever waits.
                    is_told = True
                    control.wake()
                self._lock.wait()
        held_s = time.monotonic() - began
        if held_s > STALL_REPORT_S:
            events.emit(events.Stalled("cut", held_s, position & STEP_MASK))
        return GateVerdict.GO

    def _wait_closed(self, timeout_s: float) -> GateVerdict:
        control, end = self._control, time.monotonic() + timeout_s
        control.notice("close", None, Wish.CLOSE)
        with self._lock:
            while not control.is_closed and control.departed is None:
                self._check_alive()
                left = end - time.monotonic()
                if left <= 0:
                    raise CutTimeoutError(
                        f"close: not all ranks have closed within {timeout_s:g} s; "
                        f"call close() on every rank"
                    )
                self._lock.wait(left)
            if control.departed is None:
                return GateVerdict.GO
            control.reached()
            return GateVerdict.LEAVE

    def _exchange(self, label: str, value: bytes, timeout_s: float) -> list[bytes]:
        control = self._control
        self._serial += 1
        control.gather(label, value)
        result = self._await_exchange(timeout_s)
        if result is None:
            missing = list(control.missing())
            why = (
                f"not complete after {timeout_s:g} s; "
                f"missing: {f'ranks {missing[:16]}' if missing else 'the answer'}"
            )
            # Or those who come late would find it complete, and begin what this rank has given up.
            control.gather(WITHDRAWN, why.encode())
            result = self._await_exchange(WITHDRAWAL_S) or Exchanged(0, None, why)
        if result.values is not None:
            return list(result.values)
        kind = LeavingError if control.departed is not None else CoordinationError
        if control.has_lost():
            kind = PeerLostError
        raise kind(f"exchange {label!r}: {result.why}")

    def _await_exchange(self, timeout_s: float) -> Exchanged | None:
        """How it ended; None when it has not after `timeout_s`.

        Exchanges that the others gave up without this rank have taken serials of their own.
        """
        control, end = self._control, time.monotonic() + timeout_s
        with self._lock:
            while True:
                result = control.exchanged.pop(self._serial, None)
                if result is not None and result.is_passed_over:
                    self._serial += 1
                    continue
                left = end - time.monotonic()
                if result is not None or left <= 0:
                    return result
                self._check_alive()
                self._lock.wait(left)

    def _check_alive(self) -> None:
        if self._control.is_over:
            raise CoordinationError(
                "the control thread of this rank has ended: closed already, or see its traceback"
            )
