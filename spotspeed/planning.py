"""What saves of this rank have taken so far, and what that means for a notice."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from spotspeed import events
from spotspeed.checkpoint.measuring import has_room, measure_copy, measure_store
from spotspeed.checkpoint.queue import SaveHandle
from spotspeed.config import SpotSpeedConfig
from spotspeed.coordinator.notice.kubernetes import VARIABLE as POD_VARIABLE
from spotspeed.coordinator.notice.kubernetes import kubernetes_workplace
from spotspeed.coordinator.notice.workplace import LEAVE_S
from spotspeed.core.deadline import (
    NOTICES_S,
    Action,
    Decision,
    Limits,
    Measured,
    Orders,
    Pace,
    Places,
    choose,
    largest_durable_bytes,
    patience_s,
)
from spotspeed.core.saver_protocol import Cost
from spotspeed.errors import StorageError
from spotspeed.state.late import GRACE_S
from spotspeed.storage.contract import Storage
from spotspeed.supervised import VARIABLES

_logger = logging.getLogger("spotspeed")
AGREEMENT_S = 0.1
"""From a notice until all ranks know the step, unless it was seen to take longer."""
LAUNCHER_GRACE_S = 30.0
"""torchrun's --shutdown-timeout, and what `deepspeed` waits for a rank."""
TRIAL_BYTES = 4 * 1024 * 1024
LEAST_TRIAL_BYTES = 64 * 1024
TRIAL_S = 0.25
TRIAL_NICE = 10
"""What the estimate at the start writes at most, a quarter of the state otherwise, and how much it
gives way to the training."""
TRIAL_ROOM_BYTES = 256 * TRIAL_BYTES
"""A disk with less room than that is not tried."""
REMEMBERED = 3
"""Saves of which the slowest counts."""
STEPS = 5
"""Steps of which the one in the middle counts."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a notice's save is to be made; `patience_s` for the end of the training's step."""

    orders: Orders
    patience_s: float


class Planner:
    """Measures every save that it follows; any thread may ask.

    At the start, and again with the first one that is durable, it says what notices of the usual
    lengths can save, and it warns whenever the state begins not to fit into the notice that is to
    be expected.
    """

    def __init__(
        self, config: SpotSpeedConfig, rank: int, *, launcher_s: float | None = None,
        pod_s: float | None = None,
    ) -> None:  # fmt: skip
        """How long after its signal the launcher leaves the ranks, and the pod all processes."""
        self._rank, self._url, self._launcher_s = rank, config.path, launcher_s
        self._pod_s, self._poll_s = pod_s, 0.0
        self._expected_s = config.notice.deadline_s
        self._signals = frozenset(config.notice.signals)
        self._compression = config.compression or ""
        self._state_bytes = 0
        self._stage_bytes_s = 0.0
        self._agreement_s = AGREEMENT_S
        self._remote: deque[Pace] = deque(maxlen=REMEMBERED)
        self._near: deque[Pace] = deque(maxlen=REMEMBERED)
        self._seals_s: deque[float] = deque(maxlen=REMEMBERED)
        self._steps_s: deque[float] = deque(maxlen=STEPS)
        self._stepped_at: float | None = None
        self._is_fit: bool | None = None
        self._lock = threading.Lock()
        self._telling = threading.Lock()
        """Held while a forecast is told, all of it: an estimate never follows what is measured."""
        self._heard_at: float | None = None

    def begin(self, url: str, *, poll_s: float = 0.0) -> None:
        """The store is open, and notices are heard up to `poll_s` late."""
        self._url, self._poll_s = url, poll_s

    @property
    def kill_s(self) -> float | None:
        """When this rank leaves by itself after its launcher's SIGTERM; None: none will kill it."""
        return None if self._launcher_s is None else self._launcher_s - LEAVE_S

    def estimate(self, storage: Storage, state_bytes: int) -> None:
        """Say, soon, what notices can save of so many bytes, by a small trial of the store."""

        def estimate() -> None:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), TRIAL_NICE)
            try:
                if not has_room(storage, TRIAL_ROOM_BYTES):
                    return
                limit_bytes = min(TRIAL_BYTES, max(LEAST_TRIAL_BYTES, state_bytes // 4))
                write_bytes_s, seal_s = measure_store(
                    storage, limit_s=TRIAL_S, limit_bytes=limit_bytes
                )
            except StorageError as error:
                _logger.info("what a notice can save is not known yet: %s", error)
                return
            stage_bytes_s = measure_copy(TRIAL_BYTES)
            measured = Measured(state_bytes, stage_bytes_s, AGREEMENT_S, poll_s=self._poll_s)
            places = Places(self._url, Pace(write_bytes_s), seal_s)
            with self._telling:
                if self._is_fit is None:
                    self._forecast(_Ahead(measured, places), is_estimate=True)

        if self._rank == 0 and state_bytes:
            threading.Thread(target=estimate, name="spotspeed-estimate", daemon=True).start()

    def heard(self) -> None:
        """A notice has come to this rank."""
        self._heard_at = time.monotonic()

    def stepped(self) -> None:
        """An update is complete."""
        now = time.monotonic()
        if self._stepped_at is not None:
            self._steps_s.append(now - self._stepped_at)
        self._stepped_at = now

    def follow(self, handle: SaveHandle) -> None:
        """Learn from a save that has been asked for."""
        stored_at: list[float] = []
        handle.stored_completion.add_done_callback(lambda _: stored_at.append(time.monotonic()))

        def settled(future: Future[Any]) -> None:
            took_s = time.monotonic() - stored_at[0] if stored_at else 0.0
            self._learn(handle, None if future.exception() else took_s)

        handle.upload_completion.add_done_callback(settled)

    def plan(self, step: int, source: str, left_s: float, newest: str) -> Plan:
        """How to save `step` in `left_s` seconds; `newest` is what is durable, in words."""
        if self._heard_at is not None:
            self._agreement_s = max(self._agreement_s, time.monotonic() - self._heard_at)
        with self._lock:
            measured, places = self._measured(), self._places()
        if measured is None or places is None:
            orders, wait_s = Orders(self._compression), min(GRACE_S, left_s / 4)
            events.emit(events.Planned(
                step, self._rank, Action.SAVE.value, _short(left_s), math.inf, math.inf,
                _short(wait_s), orders.compression, False, "no save has been measured yet",
            ))  # fmt: skip
            return Plan(orders, wait_s)
        is_signal = source in self._signals
        launcher_s = self._launcher_s if is_signal else None
        limits = Limits(left_s, launcher_s, self._pod_s if is_signal else None)
        decision, orders = choose(limits, measured, places)
        wait_s = patience_s(decision, limits, at_most_s=GRACE_S)
        reason = decision.reason
        if decision.action is not Action.SAVE:
            if decision.action is not Action.SAVE_NODE:
                reason += f"; nothing newer than {newest} can make it"
            events.emit(events.Unsafe(
                self._rank, _short(left_s), _short(decision.done_s), measured.state_bytes,
                _Ahead(measured, places).largest_bytes(left_s), reason,
            ))  # fmt: skip
        events.emit(events.Planned(
            step, self._rank, decision.action.value, _short(left_s), _short(decision.staged_s),
            _short(decision.done_s), _short(wait_s), orders.compression, orders.is_direct, reason,
        ))  # fmt: skip
        return Plan(orders, wait_s)

    # Inside.

    def _learn(self, handle: SaveHandle, seal_s: float | None) -> None:
        """Remember what a settled save took; `seal_s` after the own part, None when it failed."""
        staging = handle.staging_completion
        with self._lock:
            for cost in handle.costs:
                pace = _pace(cost)
                if pace is not None:
                    (self._near if cost.is_near else self._remote).append(pace)
            if staging.done() and staging.exception() is None:
                facts = staging.result()
                # With what it waited for the pool: one that is too small will hold the next, too.
                rate = facts.size_bytes / max(1e-6, facts.elapsed_s)
                self._state_bytes = facts.size_bytes
                self._stage_bytes_s = max(self._stage_bytes_s, rate)
            if seal_s is not None:
                self._seals_s.append(seal_s)
            measured, places = self._measured(), self._places()
        if seal_s is not None and measured is not None and places is not None:
            self._look_ahead(measured, places)

    def _look_ahead(self, measured: Measured, places: Places) -> None:
        """Say once what notices can save, and warn when the expected one begins to be too short."""
        # An evaluation or a compilation between two steps is nothing that a cut waits for.
        step_s = statistics.median(self._steps_s) if self._steps_s else 0.0
        later = measured.after_notice(
            agreement_s=self._agreement_s, step_s=step_s, poll_s=self._poll_s
        )
        ahead = _Ahead(later, places)
        with self._telling:
            before = self._is_fit
            if before is None and self._rank == 0:
                self._forecast(ahead, is_estimate=False)
            self._is_fit = ahead.decide(self._expected_s).action is Action.SAVE
        if not self._is_fit and before in (None, True):
            self._warn(ahead)

    def _forecast(self, ahead: _Ahead, *, is_estimate: bool) -> None:
        for notice_s in NOTICES_S:
            decision = ahead.decide(notice_s)
            events.emit(events.Forecast(
                notice_s, decision.action.value, _short(decision.done_s),
                ahead.measured.state_bytes, ahead.largest_bytes(notice_s), decision.reason,
                is_estimate,
            ))  # fmt: skip
        if is_estimate and ahead.decide(self._expected_s).action is not Action.SAVE:
            self._warn(ahead)

    def _warn(self, ahead: _Ahead) -> None:
        decision = ahead.decide(self._expected_s)
        events.emit(events.Unsafe(
            self._rank, self._expected_s, _short(decision.done_s), ahead.measured.state_bytes,
            ahead.largest_bytes(self._expected_s), decision.reason,
        ))  # fmt: skip

    def _measured(self) -> Measured | None:
        if self._stage_bytes_s <= 0:
            return None
        return Measured(self._state_bytes, self._stage_bytes_s, agreement_s=0.0)

    def _places(self) -> Places | None:
        if not self._remote:
            return None
        seal_s = max(self._seals_s, default=0.0)
        near = _slowest(self._near) if self._near else None
        return Places(self._url, _slowest(self._remote), seal_s, near, self._compression)


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A notice that may come at any time."""

    measured: Measured
    places: Places

    def decide(self, notice_s: float) -> Decision:
        return choose(Limits(cloud_s=notice_s), self.measured, self.places)[0]

    def largest_bytes(self, notice_s: float) -> int:
        return largest_durable_bytes(Limits(cloud_s=notice_s), self.measured, self.places)


def pod_grace_s(environ: Mapping[str, str]) -> float | None:
    """Seconds from a pod's SIGTERM to its SIGKILL, where it is stated."""
    found = kubernetes_workplace(environ)
    return found.grace_s if found is not None and environ.get(POD_VARIABLE) else None


def launcher_grace_s(environ: Mapping[str, str]) -> float | None:
    """Seconds from a launcher's own signal to its SIGKILL, where it is told by the environment.

    None under a supervisor, which keeps the launcher out of it. mpirun's 0.3 s are left out: a rank
    cannot tell whether a SIGTERM came from there, and whoever passes a notice on is told to send
    SIGUSR1.
    """
    if any(map(environ.get, VARIABLES)):
        return None
    is_killing = "TORCHELASTIC_RUN_ID" in environ or "CROSS_RANK" in environ
    return LAUNCHER_GRACE_S if is_killing else None


def _pace(cost: Cost) -> Pace | None:
    return Pace.of(cost.raw_bytes, cost.stored_bytes, cost.encode_s, cost.write_s)


def _slowest(paces: deque[Pace]) -> Pace:
    return min(paces, key=lambda pace: pace.write_bytes_s / pace.ratio)


def _short(seconds: float) -> float:
    return round(seconds, 3)
