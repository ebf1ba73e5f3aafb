"""The leader's part in rounds: collect locks, decide the step, collect saves, tell the outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from spotspeed.core.cut_actions import Timing
from spotspeed.core.cut_messages import (
    Closed,
    Cut,
    Decide,
    Heard,
    Leave,
    Message,
    Notice,
    Outcome,
    Phase,
    Prepare,
    Report,
    Term,
    Wish,
)


@dataclass(slots=True)
class Round:
    """One round as its leader sees it."""

    number: int
    stop: bool
    source: str
    deadline: float | None
    resend_at: float
    cut: Cut | None = None
    capture_by: float | None = None
    rest_by: float | None = None
    started: dict[int, int] = field(default_factory=dict)
    reports: dict[int, Report] = field(default_factory=dict)
    outcome: Outcome | None = None

    def phase(self, rank: int) -> Phase:
        report = self.reports.get(rank)
        return Phase.NONE if report is None else report.phase


@dataclass(slots=True)
class Leader:
    """Runs the rounds of one term for `members`, of which `rank` itself is one.

    One round at a time is between its lock and the moment when all know its step; saves of several
    rounds may be under way. `post(to, message)` sends; times are absolute, of the driver's clock.
    """

    rank: int
    term: Term
    members: tuple[int, ...]
    lost: tuple[int, ...]
    timing: Timing
    unix_offset_s: float
    post: Callable[[int, Message], None]
    next_round: int = 1
    rounds: dict[int, Round] = field(default_factory=dict)
    closing: set[int] = field(default_factory=set)
    closed_heard: set[int] = field(default_factory=set)
    close_by: float | None = None
    left: Leave | None = None
    _queued: tuple[float | None, str] | None = None
    _resend_closed_at: float = 0.0

    def wish(self, sender: int, notice: Notice, now: float) -> None:
        """A rank wants a save, a stop, or to close."""
        self.post(sender, Heard(notice.serial))
        if self.close_by is not None or self.left is not None:
            return
        if notice.wish is Wish.CLOSE:
            self.closing.add(sender)
            self._consider_close(now)
            return
        deadline = None if notice.seconds_left is None else now + notice.seconds_left
        if notice.wish is Wish.STOP:
            self._want_stop(deadline, notice.source, now)
        elif self._may_snap():
            self._begin(False, None, notice.source, now)

    def open_rounds(self) -> list[Round]:
        """Rounds without an outcome."""
        return [entry for entry in self.rounds.values() if entry.outcome is None]

    def report(self, sender: int, report: Report, now: float) -> None:
        """A member is so far in a round; anything about other rounds is old and ignored."""
        entry = self.rounds.get(report.round)
        if entry is None or sender not in self.members:
            if self.left is not None and self.left.round == report.round:
                self.post(sender, self.left)
            return
        if report.phase is Phase.LOCKED:
            if entry.cut is None and entry.outcome is None:
                entry.started[sender] = report.started
                if len(entry.started) == len(self.members):
                    self._decide(entry, max(entry.started.values()), now)
            return
        if report.phase > entry.phase(sender):
            entry.reports[sender] = report
            self._advance(entry, now)

    def settle(self, step: int, deadline: float | None, now: float) -> None:
        """After a loss, with all survivors locked: stop at `step`."""
        entry = Round(self.next_round, True, "peer lost", deadline, now)
        self.next_round += 1
        entry.capture_by = now + self.timing.settle_s
        self.rounds[entry.number] = entry
        self._decide(entry, step, now)

    def adopt(self, cut: Cut, outcome: Outcome | None, deadline: float | None, now: float) -> None:
        """After a loss: go on with what an earlier leader decided."""
        stop = cut.stop if outcome is None else outcome.stop
        entry = Round(cut.round, stop, cut.source, deadline, now, cut=cut, outcome=outcome)
        if outcome is None:
            entry.capture_by = now + self.timing.settle_s
        self.rounds[cut.round] = entry
        self._resend(entry, now)

    def tick(self, now: float) -> None:
        """Send again what was not answered; end what has run out of time."""
        for entry in list(self.rounds.values()):
            if entry.outcome is None and _is_over(entry.deadline, now):
                self._end(entry, None, "the deadline has come", now)
            elif entry.outcome is None and _is_over(entry.capture_by, now):
                self._end(entry, None, "the survivors did not reach one step", now)
            elif entry.outcome is None and _is_over(entry.rest_by, now):
                self._end(entry, None, "a survivor is stuck in its update", now)
            if now >= entry.resend_at:
                self._resend(entry, now)
        if self.close_by is not None and now >= self._resend_closed_at:
            self._tell_closed(now)

    def wake(self) -> float | None:
        """When `tick` has something to do."""
        times = [entry.resend_at for entry in self.rounds.values()]
        for entry in self.open_rounds():
            ends = (entry.deadline, entry.capture_by, entry.rest_by)
            times += [end for end in ends if end is not None]
        if self.close_by is not None:
            times.append(self._resend_closed_at)
        return min(times, default=None)

    def is_closed(self, now: float) -> bool:
        """Whether all have closed and know it, or have had time to."""
        if self.close_by is None:
            return False
        return self.closed_heard.issuperset(self.members) or now >= self.close_by

    def _want_stop(self, deadline: float | None, source: str, now: float) -> None:
        stopping = [entry for entry in self.rounds.values() if entry.stop]
        agreeing = [entry for entry in self.rounds.values() if not self._is_decided(entry)]
        if stopping:
            stopping[0].deadline = _sooner(stopping[0].deadline, deadline)
        elif agreeing and agreeing[0].cut is None:
            entry = agreeing[0]
            entry.stop, entry.source, entry.deadline = True, source, deadline
        else:
            queued = self._queued or (None, source)
            self._queued = (_sooner(queued[0], deadline), queued[1])
            self._begin_queued(now)

    def _may_snap(self) -> bool:
        """A wish for a save joins the round that runs, unless that one only has to be written."""
        if any(entry.stop or not self._is_decided(entry) for entry in self.rounds.values()):
            return False
        return all(self._is_captured(entry) for entry in self.open_rounds())

    def _begin_queued(self, now: float) -> None:
        """Stop once all know the step of the round that runs; several wishes are one stop."""
        if self._queued is not None and all(map(self._is_decided, self.rounds.values())):
            (deadline, source), self._queued = self._queued, None
            self._begin(True, deadline, source, now)

    def _begin(self, stop: bool, deadline: float | None, source: str, now: float) -> None:
        entry = Round(self.next_round, stop, source, deadline, now)
        self.next_round += 1
        self.rounds[entry.number] = entry
        self._resend(entry, now)

    def _decide(self, entry: Round, step: int, now: float) -> None:
        entry.cut = Cut(
            entry.number, step, entry.stop, _attempt(entry.number, self.term),
            max(0, int(now + self.unix_offset_s)), entry.source, None, self.lost,
        )  # fmt: skip
        self._resend(entry, now)
        if not entry.stop:
            return
        for other in self.open_rounds():
            if other.cut is not None and other.cut.step < step and not self._is_captured(other):
                self._end(other, None, f"superseded by the last save at step {step}", now)

    def _advance(self, entry: Round, now: float) -> None:
        if entry.outcome is not None:
            self._finish_if_known(entry, now)
            self._begin_queued(now)
            return
        failed = [rank for rank in self.members if entry.phase(rank) is Phase.FAILED]
        if failed and not self.lost:
            self._end(entry, None, f"rank {failed[0]}: {entry.reports[failed[0]].why}", now)
        elif all(entry.phase(rank) >= Phase.DURABLE for rank in self.members):
            self._end(entry, *self._verdict(entry), now)
        if self._is_captured(entry):
            entry.capture_by = None
        self._watch_rest(entry, now)
        self._begin_queued(now)

    def _watch_rest(self, entry: Round, now: float) -> None:
        """After a loss, from when all know the step until all rest at it."""
        if entry.capture_by is None or self._has_everywhere(entry, Phase.RESTING):
            entry.rest_by = None
        elif entry.rest_by is None and self._is_decided(entry):
            entry.rest_by = now + self.timing.stuck_s

    def _verdict(self, entry: Round) -> tuple[str | None, str]:
        digests = {report.digest for report in entry.reports.values()} - {None}
        if len(digests) == 1:
            return digests.pop(), ""
        if digests:
            return None, f"the ranks know different seals: {', '.join(sorted(map(str, digests)))}"
        failed = [report.why for report in entry.reports.values() if report.phase is Phase.FAILED]
        return None, failed[0] if failed else "all parts were written, but nobody has seen the seal"

    def _end(self, entry: Round, digest: str | None, why: str, now: float) -> None:
        entry.outcome = Outcome(entry.number, entry.stop, digest, why)
        self._resend(entry, now)

    def _finish_if_known(self, entry: Round, now: float) -> None:
        if any(entry.phase(rank) is not Phase.KNOWN for rank in self.members):
            return
        assert entry.outcome is not None
        del self.rounds[entry.number]
        if entry.stop:
            self.left = Leave(entry.number, entry.outcome.digest, entry.outcome.why)
            for rank in self.members:
                self.post(rank, self.left)
        else:
            self._begin_queued(now)
            self._consider_close(now)

    def _resend(self, entry: Round, now: float) -> None:
        wait_s = self.timing.resend_s
        if entry.outcome is not None:
            message: Message = entry.outcome
            behind = [rank for rank in self.members if entry.phase(rank) is not Phase.KNOWN]
        elif entry.cut is not None:
            left = None if entry.deadline is None else entry.deadline - now
            message = Decide(replace(entry.cut, seconds_left=left))
            behind = [rank for rank in self.members if entry.phase(rank) < Phase.DECIDED]
            if not behind:
                behind = [rank for rank in self.members if entry.phase(rank) < Phase.DURABLE]
                wait_s = self.timing.poll_s
        else:
            message = Prepare(entry.number)
            behind = [rank for rank in self.members if rank not in entry.started]
        entry.resend_at = now + wait_s
        for rank in behind:
            self.post(rank, message)

    def _consider_close(self, now: float) -> None:
        if self.rounds or not self.closing.issuperset(self.members):
            return
        self.close_by = now + self.timing.linger_s
        self.closed_heard.add(self.rank)
        self._tell_closed(now)

    def _tell_closed(self, now: float) -> None:
        self._resend_closed_at = now + self.timing.resend_s
        for rank in self.members:
            if rank not in self.closed_heard:
                self.post(rank, Closed())

    def _is_decided(self, entry: Round) -> bool:
        """Whether every rank knows the step, so that another round may lock."""
        return self._has_everywhere(entry, Phase.DECIDED)

    def _is_captured(self, entry: Round) -> bool:
        return self._has_everywhere(entry, Phase.CAPTURED)

    def _has_everywhere(self, entry: Round, phase: Phase) -> bool:
        return all(entry.phase(rank) >= phase for rank in self.members)


def _attempt(number: int, term: Term) -> str:
    """Name of a round's save: unique over rounds and over leaders that do not know each other."""
    name = f"c{number:04d}"
    return name if term.counter == 0 else f"{name}t{term.counter}r{term.leader}"


def _sooner(one: float | None, other: float | None) -> float | None:
    ends = [end for end in (one, other) if end is not None]
    return min(ends, default=None)


def _is_over(end: float | None, now: float) -> bool:
    return end is not None and now >= end
