"""Wrong cut rules: each is one change to the Python machine; the first five look tempting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from spotspeed.core.cut import CutMachine
from spotspeed.core.cut_fence import Plan
from spotspeed.core.cut_gate import OPEN, Gate
from spotspeed.core.cut_leader import Leader, Round
from spotspeed.core.cut_member import Member
from spotspeed.core.cut_messages import Decide, Phase, Report
from spotspeed.core.cut_wishes import Wishes

Patch = Callable[[pytest.MonkeyPatch], None]


def park_at_the_own_next_boundary(patch: pytest.MonkeyPatch) -> None:
    original = Member.decide

    def decide(self: Member, message: Decide, now: float) -> None:
        original(self, Decide(replace(message.cut, step=self.gate.started)), now)

    patch.setattr(Member, "decide", decide)


def report_without_lock(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Gate, "lock", lambda self: self.started)


def one_more_than_the_largest_without_lock(patch: pytest.MonkeyPatch) -> None:
    report_without_lock(patch)
    original = Leader._decide
    patch.setattr(Leader, "_decide", lambda self, entry, step, now: original(
        self, entry, step + 1, now))  # fmt: skip


def largest_completed(patch: pytest.MonkeyPatch) -> None:
    def lock(self: Gate) -> int:
        self.limit = min(self.limit, self.started)
        self._settle()
        return self.completed

    patch.setattr(Gate, "lock", lock)


def lock_without_release(patch: pytest.MonkeyPatch) -> None:
    original = Gate.allow
    patch.setattr(Gate, "allow", lambda self, limit: original(self, limit) if limit == OPEN
                  else None)  # fmt: skip


def no_resend_of_wishes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Wishes, "tick", lambda self, now: None)
    patch.setattr(Wishes, "wake", lambda self: None)


def no_resend_by_the_leader(patch: pytest.MonkeyPatch) -> None:
    original = Leader.tick

    def tick(self: Leader, now: float) -> None:
        for entry in self.rounds.values():
            entry.resend_at = float("inf")
        original(self, now)

    patch.setattr(Leader, "tick", tick)


def no_check_of_the_round(patch: pytest.MonkeyPatch) -> None:
    original = Leader.report

    def report(self: Leader, sender: int, message: Report, now: float) -> None:
        for entry in self.rounds.values():
            if entry.cut is None:
                message = replace(message, round=entry.number)
        original(self, sender, message, now)

    patch.setattr(Leader, "report", report)


def listening_to_the_lost(patch: pytest.MonkeyPatch) -> None:
    """No check of the term, and none of who speaks."""
    sound = CutMachine.receive

    def receive(self: CutMachine, sender: int, term: Any, message: Any, now: float) -> Any:
        if type(message).__name__ in ("Fence", "Suspect") or term == self.term:
            return sound(self, sender, term, message, now)
        found, self.term = self.term, term
        self._dispatch(sender, message, now)
        self.term = found
        return self._drain(now)

    patch.setattr(CutMachine, "receive", receive)


def no_hold_until_staged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Gate, "hold", lambda self, number, position: None)


def let_go_before_the_outcome_is_told(patch: pytest.MonkeyPatch) -> None:
    original = Member.failed

    def failed(self: Member, number: int, why: str) -> None:
        original(self, number, why)
        self.gate.drop(number)

    patch.setattr(Member, "failed", failed)


def sealed_when_one_rank_is_done(patch: pytest.MonkeyPatch) -> None:
    original = Leader._advance

    def advance(self: Leader, entry: Round, now: float) -> None:
        done = [rank for rank in self.members if entry.phase(rank) is Phase.DURABLE]
        if done and entry.outcome is None and entry.cut is not None:
            self._end(entry, f"seal of {entry.cut.attempt}", "", now)
        original(self, entry, now)

    patch.setattr(Leader, "_advance", advance)


def leave_before_all_know(patch: pytest.MonkeyPatch) -> None:
    original = Leader._end

    def end(self: Leader, entry: Round, digest: str | None, why: str, now: float) -> None:
        original(self, entry, digest, why, now)
        for rank in self.members:
            entry.reports[rank] = Report(entry.number, Phase.KNOWN)
        self._finish_if_known(entry, now)

    patch.setattr(Leader, "_end", end)


def close_without_the_others(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Leader, "_consider_close", lambda self, now: (
        setattr(self, "close_by", now + 1.0), self._tell_closed(now)))  # fmt: skip


def no_lock_after_a_loss(patch: pytest.MonkeyPatch) -> None:
    def fence(self: Member) -> int:
        self.is_fenced = True
        return self.gate.started

    patch.setattr(Member, "fence", fence)


def forget_known_outcomes(patch: pytest.MonkeyPatch) -> None:
    from spotspeed.core import cut

    original = cut.plan_after_loss

    def plan(statuses: Any, why: str) -> Plan:
        found = original(statuses, why)
        return replace(found, ended=(), adopted=None)

    patch.setattr(cut, "plan_after_loss", plan)


def settle_at_the_smallest_step(patch: pytest.MonkeyPatch) -> None:
    from spotspeed.core import cut

    original = cut.plan_after_loss

    def plan(statuses: Any, why: str) -> Plan:
        return replace(original(statuses, why),
                       step=min(status.started for status in statuses.values()))  # fmt: skip

    patch.setattr(cut, "plan_after_loss", plan)


def wait_for_the_stuck(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Leader, "_watch_rest", lambda self, entry, now: None)


WRONG_RULES: tuple[Patch, ...] = (
    park_at_the_own_next_boundary,
    report_without_lock,
    one_more_than_the_largest_without_lock,
    largest_completed,
    lock_without_release,
    no_resend_of_wishes,
    no_resend_by_the_leader,
    no_check_of_the_round,
    no_hold_until_staged,
    let_go_before_the_outcome_is_told,
    sealed_when_one_rank_is_done,
    leave_before_all_know,
    close_without_the_others,
    no_lock_after_a_loss,
    forget_known_outcomes,
    settle_at_the_smallest_step,
)
