"""Runs cut machines in simulated time, coupled like the ranks of a training job, and judges them.

    violation = run(draw(seed))      # None, or what went wrong; the same seed replays it

Ranks step through updates that nobody leaves before all have entered, messages take time, get lost
or wait for each other, ranks crash, are cut off or are given up falsely; savers outlive ranks.
What must hold is checked at every event (`spotspeed.testing.cut_judge`).
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

from spotspeed.core.cut import CutMachine, State
from spotspeed.core.cut_actions import (
    Action,
    AllClosed,
    Capture,
    Departed,
    PeerLost,
    Send,
    Settled,
)
from spotspeed.core.cut_messages import Cut, Message, Term, Wish, decode, encode
from spotspeed.testing.cut_judge import Judge, Violation
from spotspeed.testing.cut_scenario import HORIZON_S, Fault, Scenario, draw

MAX_EVENTS = 60_000
GRACE_S = 1.0
MachineType = Callable[..., Any]
"""Makes what has the interface of CutMachine."""


class Rank:
    """One simulated process: its machine and its main thread."""

    def __init__(self, number: int, scenario: Scenario, machine: MachineType) -> None:
        self.number = number
        self.machine = machine(number, scenario.world_size, now=0.0, timing=scenario.timing)
        self.is_alive = True
        self.step = 0
        self.waits_at: int | None = None
        self.is_closing = False
        self.timer_at: float | None = None
        self.down: set[int] = set()
        self.saver_dies_at: float | None = None
        self.mail_lost_from: float | None = None
        self.copying: dict[int, Cut] = {}


class World:
    """All ranks, the network between them, their savers, and simulated time."""

    def __init__(self, scenario: Scenario, machine: MachineType = CutMachine) -> None:
        self.scenario = scenario
        self.now = 0.0
        self.rng = random.Random(scenario.seed ^ 0x5EED)
        self.ranks = [Rank(number, scenario, machine) for number in range(scenario.world_size)]
        self.judge = Judge(scenario, self.ranks)
        self.receipts: dict[str, dict[int, int]] = {}
        self.is_encoded = scenario.seed % 16 == 0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._linked: set[tuple[int, int]] = set()
        self._last: dict[tuple[int, int], float] = {}
        self._entered: dict[int, set[int]] = {}
        self._split: Fault | None = None
        self._fuses: dict[tuple[int, str], list[Any]] = {}

    def run(self) -> None:
        """Play the schedule to its end; raises Violation."""
        size = self.scenario.world_size
        for one in range(size):
            for other in range(size):
                if one != other and (self.scenario.is_mesh or 0 in (one, other)):
                    self._linked.add((one, other))
        for rank in self.ranks:
            self._forward(rank)
        for ask in self.scenario.asks:
            self.at(ask.at_s, self._ask, ask)
        for fault in self.scenario.faults:
            if fault.sends is None:
                self.at(fault.at_s, self._break, fault)
            else:
                self._fuses[fault.ranks[0], fault.sends[0]] = [fault.sends[1], fault]
        while self._events and self.now < HORIZON_S:
            self.now, _, happen, args = heapq.heappop(self._events)
            happen(*args)
            if self._count > MAX_EVENTS:
                raise Violation(f"no end after {MAX_EVENTS} events")
        self.judge.at_end(self.now)

    def at(self, time: float, happen: Callable[..., None], *args: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (max(time, self.now), self._count, happen, args))

    def after(self, seconds: float, happen: Callable[..., None], *args: Any) -> None:
        self.at(self.now + seconds, happen, *args)

    # The training.

    def _forward(self, rank: Rank) -> None:
        if rank.step >= self.scenario.steps:
            rank.is_closing = True
            self.act(rank, rank.machine.notice(Wish.CLOSE, None, "close", self.now))
            return
        seconds = self.scenario.step_s * self.rng.uniform(0.5, 1.5)
        if self.rng.random() < self.scenario.slow_share:
            seconds += self.rng.uniform(0, 20) * self.scenario.step_s
        self.after(seconds, self._reach_gate, rank, rank.step + 1)

    def _reach_gate(self, rank: Rank, step: int) -> None:
        if rank.is_alive:
            rank.waits_at = step
            self._try_gate(rank)
            self._arm(rank)

    def _try_gate(self, rank: Rank) -> None:
        step = rank.waits_at
        if step is None or rank.machine.state is State.LEFT:
            return
        if not rank.machine.enter(step, self.now):
            return
        rank.waits_at = None
        self.judge.entered(rank, step)
        entered = self._entered.setdefault(step, set())
        entered.add(rank.number)
        if len(entered) == self.scenario.world_size:
            for other in self.ranks:
                seconds = self.scenario.update_s * self.rng.uniform(0.2, 1.0)
                self.after(seconds, self._finish_update, other, step)

    def _finish_update(self, rank: Rank, step: int) -> None:
        if rank.is_alive:
            rank.step = step
            self.act(rank, rank.machine.completed(step, self.now))
            self._forward(rank)

    def _exit(self, rank: Rank) -> None:
        """The process ends; what it sent arrives before its end is seen."""
        if not rank.is_alive:
            return
        rank.is_alive = False
        self.judge.exited(rank, self.now)
        for other in self.ranks:
            if (rank.number, other.number) in self._linked:
                seen_at = max(self.now + self._delay(), self._last_sent(rank, other))
                self.at(seen_at, self._peer_down, other, rank.number, "connection ended")

    # Wishes and faults.

    def _ask(self, ask: Any) -> None:
        rank = self.ranks[ask.rank]
        if rank.is_alive and rank.machine.state is State.RUNNING:
            self.judge.asked(ask, rank, self.now)
            source = "signal" if ask.wish is Wish.STOP else "periodic"
            self.act(rank, rank.machine.notice(ask.wish, ask.seconds_left, source, self.now))

    def _break(self, fault: Fault) -> None:
        kind = self.scenario.kind
        if kind == "crash":
            rank = self.ranks[fault.ranks[0]]
            self.judge.broke_at = self.now
            if fault.takes_saver:
                rank.saver_dies_at = self.now
                rank.mail_lost_from = self.now + self._delay()
            self._exit(rank)
        elif kind == "suspicion":
            one, other = self.ranks[fault.by], self.ranks[fault.ranks[0]]
            self._peer_down(one, other.number, "reset")
            self.after(self._delay(), self._peer_down, other, one.number, "reset")
        else:
            self._split = fault
            if fault.lasts_s > self.scenario.peer_timeout_s:
                for observer, lost in sorted(self._linked):
                    if self._is_cut(observer, lost):
                        seconds = self.scenario.peer_timeout_s * self.rng.uniform(1.0, 1.3)
                        self.after(seconds, self._peer_down, self.ranks[observer], lost, "silent")

    def _burn(self, rank: Rank, kind: str) -> None:
        fuse = self._fuses.get((rank.number, kind)) if self._fuses else None
        if fuse is not None:
            fuse[0] -= 1
            if fuse[0] == 0:
                self._break(fuse[1])

    def _is_cut(self, one: int, other: int) -> bool:
        split = self._split
        if split is None or self.now >= split.at_s + split.lasts_s:
            return False
        return (one in split.ranks) is not (other in split.ranks)

    def _peer_down(self, rank: Rank, other: int, why: str) -> None:
        if rank.is_alive and other not in rank.down:
            rank.down.add(other)
            self.act(rank, rank.machine.peer_down(other, why, self.now))

    # The network.

    def _delay(self) -> float:
        seconds = self.scenario.delay_s * self.rng.uniform(0.2, 1.0)
        if self.scenario.spike and self.rng.random() < self.scenario.spike:
            seconds += self.rng.uniform(0, 0.6)
        return seconds

    def _last_sent(self, rank: Rank, other: Rank) -> float:
        return self._last.get((rank.number, other.number), 0.0)

    def _send(self, rank: Rank, action: Send) -> None:
        other, one = action.to, rank.number
        self.judge.sent(rank, action)
        if other in rank.down:
            return
        fresh = (one, other) not in self._linked
        self._linked |= {(one, other), (other, one)}
        target = self.ranks[other]
        if not target.is_alive:
            seen_at = max(self.now + self._delay(), self._last_sent(target, rank))
            self.at(seen_at, self._peer_down, rank, other, "refused")
            return
        arrives = self.now + self._delay()
        if self._is_cut(one, other):
            assert self._split is not None
            if self._split.lasts_s > self.scenario.peer_timeout_s:
                if fresh:
                    wait_s = self.scenario.peer_timeout_s
                    self.after(wait_s, self._peer_down, rank, other, "unreachable")
                return
            arrives += self._split.at_s + self._split.lasts_s - self.now
        if self.scenario.loss and self.rng.random() < self.scenario.loss:
            return
        arrives = max(arrives, self._last_sent(rank, target))
        self._last[one, other] = arrives
        self.at(arrives, self._deliver, target, one, action.term, action.message)

    def _deliver(self, rank: Rank, sender: int, term: Term, message: Message) -> None:
        if not rank.is_alive or sender in rank.down:
            return
        lost_from = self.ranks[sender].mail_lost_from
        if lost_from is not None and self.now > lost_from:
            return
        if self.is_encoded:
            term, message = decode(encode(term, message), source=f"rank {sender}")
        self.act(rank, rank.machine.receive(sender, term, message, self.now))

    # The control thread.

    def act(self, rank: Rank, actions: list[Action]) -> None:
        """Do what a machine asks for, as the control thread does, then let the gate be tried."""
        for action in actions:
            if not rank.is_alive:
                return
            if isinstance(action, Send):
                self._send(rank, action)
                self._burn(rank, type(action.message).__name__)
            elif isinstance(action, Capture):
                self._capture(rank, action.cut)
            elif isinstance(action, Settled):
                self.judge.settled(rank, action)
                if action.digest is None:
                    rank.copying.pop(action.cut.round, None)
                self.act(rank, rank.machine.delivered(action.cut.round, self.now))
            elif isinstance(action, Departed):
                self.judge.departed(rank, action, self.now)
                ready = rank.waits_at is not None or rank.is_closing
                self.after(0.001 if ready else GRACE_S, self._exit, rank)
            elif isinstance(action, AllClosed):
                self.judge.closed(rank)
                self.after(0.001, self._exit, rank)
            elif isinstance(action, PeerLost):
                self.judge.has_loss = True
        if rank.is_alive:
            self._try_gate(rank)
            self._arm(rank)

    def _arm(self, rank: Rank) -> None:
        wake = rank.machine.wake()
        if wake is not None and (rank.timer_at is None or wake < rank.timer_at):
            rank.timer_at = wake
            self.at(wake, self._tick, rank, wake)

    def _tick(self, rank: Rank, armed_for: float) -> None:
        if rank.timer_at == armed_for and rank.is_alive:
            rank.timer_at = None
            self.act(rank, rank.machine.tick(self.now))

    # The savers.

    def _capture(self, rank: Rank, cut: Cut) -> None:
        self.judge.captures(rank, cut)
        if cut.lost and not self.scenario.is_covered:
            self.after(0.0, self._report_failed, rank, cut, "lost parts are not covered")
        elif self.rng.random() < self.scenario.save_fails:
            self.after(self.scenario.stage_s, self._report_failed, rank, cut, "disk full")
        else:
            rank.copying[cut.round] = cut
            seconds = self.scenario.stage_s * self.rng.uniform(0.0, 1.0)
            if self.rng.random() < self.scenario.slow_share:
                seconds += self.rng.uniform(0, 40)
            self.after(seconds, self._staged, rank, cut)

    def _report_failed(self, rank: Rank, cut: Cut, why: str) -> None:
        if rank.is_alive:
            self.act(rank, rank.machine.failed(cut.round, why, self.now))

    def _staged(self, rank: Rank, cut: Cut) -> None:
        if not rank.is_alive or rank.copying.pop(cut.round, None) is None:
            return
        self.judge.captured(rank, cut)
        seconds = self.scenario.write_s * self.rng.uniform(0.1, 1.0)
        self.after(seconds, self._written, rank, cut, rank.step)
        self.act(rank, rank.machine.staged(cut.round, self.now))

    def _written(self, rank: Rank, cut: Cut, version: int) -> None:
        """The saver, which outlives its rank, puts its receipt and looks whether all are there."""
        if rank.saver_dies_at is not None and not rank.is_alive:
            return
        receipts = self.receipts.setdefault(cut.attempt, {})
        receipts[rank.number] = version
        digest = None
        if len(receipts) + len(cut.lost) >= self.scenario.world_size:
            self.judge.sealed(cut, receipts)
            digest = f"seal of {cut.attempt}"
        if self.scenario.waits_for_seal and digest is not None:
            for number in receipts:
                self._report_durable(self.ranks[number], cut, digest)
        elif not self.scenario.waits_for_seal:
            self._report_durable(rank, cut, digest)

    def _report_durable(self, rank: Rank, cut: Cut, digest: str | None) -> None:
        if rank.is_alive:
            self.act(rank, rank.machine.durable(cut.round, digest, self.now))


def run(scenario: Scenario, machine: MachineType = CutMachine) -> str | None:
    """What went wrong in one schedule, or None."""
    try:
        World(scenario, machine).run()
    except Violation as violation:
        return f"seed {scenario.seed} ({scenario.kind}, {scenario.world_size} ranks): {violation}"
    return None


def soak(count: int, *, first_seed: int = 0, machine: MachineType = CutMachine) -> list[str]:
    """Run so many schedules; what went wrong, each with the seed that replays it."""
    outcomes = (run(draw(seed), machine) for seed in range(first_seed, first_seed + count))
    return [violation for violation in outcomes if violation is not None]
