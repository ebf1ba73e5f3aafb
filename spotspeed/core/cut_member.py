"""One rank's part in rounds: lock, go up to the decided step, capture there, report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from spotspeed.core.cut_actions import Action, Capture, Decided, Departed, Settled, Timing
from spotspeed.core.cut_gate import OPEN, Gate
from spotspeed.core.cut_messages import (
    Cut,
    Decide,
    Leave,
    Message,
    Outcome,
    Phase,
    Prepare,
    Report,
    RoundView,
)

REMEMBERED_ROUNDS = 8


@dataclass(slots=True)
class Held:
    """One decided round as this rank sees it."""

    cut: Cut
    deadline: float | None
    decided_at: float
    phase: Phase = Phase.DECIDED
    digest: str | None = None
    why: str = ""
    is_settled: bool = False

    def view(self) -> RoundView:
        phase = Phase.KNOWN if self.is_settled else self.phase
        return RoundView(self.cut, phase, self.digest, self.why)


class Member:
    """Answers the leader. `say` sends to it, `actions` collects what the driver has to do."""

    def __init__(
        self, gate: Gate, timing: Timing, say: Callable[[Message], None], actions: list[Action]
    ) -> None:
        self.gate = gate
        self.timing = timing
        self.rounds: dict[int, Held] = {}
        self.top_round = 0
        self.is_fenced = False
        self.waiting_since: float | None = None
        self._top_decided = 0
        self._say = say
        self._actions = actions
        self._resend_at: float | None = None

    def receive(self, message: Prepare | Decide | Outcome, now: float) -> None:
        """A word of the leader."""
        if isinstance(message, Prepare):
            self.prepare(message)
        elif isinstance(message, Decide):
            self.decide(message, now)
        else:
            self.outcome(message, now)

    def prepare(self, message: Prepare) -> None:
        """Lock, unless that round is past its lock already."""
        number = message.round
        if number <= self._top_decided:
            self._answer(number)
            return
        self.top_round = max(self.top_round, number)
        self._say(Report(number, Phase.LOCKED, self.gate.lock()))

    def decide(self, message: Decide, now: float) -> None:
        """Take the step over: let this rank go up to it, and hold the state there."""
        cut = message.cut
        if cut.round <= self._top_decided:
            known = self.rounds.get(cut.round)
            if cut.stop and known is not None:
                self.gate.allow(cut.step)
            self._answer(cut.round)
            return
        self._top_decided = cut.round
        self.top_round = max(self.top_round, cut.round)
        deadline = None if cut.seconds_left is None else now + cut.seconds_left
        held = self.rounds[cut.round] = Held(cut, deadline, now)
        self._actions.append(Decided(cut))
        self._forget_old()
        self.gate.hold(cut.round, cut.step)
        if cut.stop:
            self.gate.allow(cut.step)
        else:
            self._unlock(False)
        if self.gate.started > cut.step:
            self._advance(held, Phase.FAILED, f"step {self.gate.started} has begun already")
        else:
            self._say(Report(cut.round, Phase.DECIDED))
        self.look(now)

    def look(self, now: float) -> None:
        """Capture what can be captured now; to be called whenever an update has completed."""
        for held in self.rounds.values():
            if held.phase is not Phase.DECIDED or held.is_settled:
                continue
            if self.gate.rests_at(held.cut.step):
                held.phase = Phase.RESTING
                self._actions.append(Capture(_at(held, now)))
                if self.is_fenced:
                    # Only after a loss does the leader ask who is stuck.
                    self._answer(held.cut.round)

    def staged(self, number: int) -> None:
        """The state of that round is out of the training's memory."""
        held = self.rounds.get(number)
        if held is None or held.phase >= Phase.CAPTURED or held.is_settled:
            return
        self.gate.drop(number)
        self._advance(held, Phase.CAPTURED, "")

    def durable(self, number: int, digest: str | None) -> None:
        """This rank's part is durable; `digest` of the sealed whole where it is known."""
        held = self.rounds.get(number)
        if held is None or held.phase >= Phase.DURABLE or held.is_settled:
            return
        self.gate.drop(number)
        held.digest = digest
        self._advance(held, Phase.DURABLE, "")

    def failed(self, number: int, why: str) -> None:
        """This rank's part will not become durable; its step stays held until the outcome."""
        held = self.rounds.get(number)
        if held is not None and held.phase < Phase.FAILED and not held.is_settled:
            self._advance(held, Phase.FAILED, why)

    def outcome(self, message: Outcome, now: float) -> None:
        """Hand the outcome to the driver, once."""
        held = self.rounds.get(message.round)
        if held is None or held.phase is Phase.KNOWN:
            if self._top_decided < message.round == self.top_round:
                self._unlock(message.stop)
            self._top_decided = max(self._top_decided, message.round)
            self.top_round = max(self.top_round, message.round)
            self._answer(message.round)
        elif not held.is_settled:
            self._settle(held, message.digest, message.why, now)

    def delivered(self, number: int, now: float) -> None:
        """The driver has told everybody here; the step is no longer held."""
        held = self.rounds.get(number)
        if held is None or not held.is_settled or held.phase is Phase.KNOWN:
            return
        self.gate.drop(number)
        held.phase = Phase.KNOWN
        self._answer(number)
        if held.cut.stop:
            self._resend_at = now + self.timing.resend_s

    def depart(self, message: Leave, now: float) -> None:
        """Settle what is still open: nobody will hear how it ends. Then go, with what is known."""
        for held in self.rounds.values():
            if not held.is_settled:
                known = held.cut.round == message.round
                why = message.why if known else "left before the outcome was known"
                self._settle(held, message.digest if known else None, why, now)
        self._resend_at = None
        sealed = [held for held in self.rounds.values() if held.cut.stop and held.digest]
        digest = sealed[-1].digest if sealed else message.digest
        self._actions.append(Departed(message.round, digest, "" if digest else message.why))

    def tick(self, now: float) -> None:
        """Give up saves that hold a step for too long; ask again to be let go."""
        if self._resend_at is not None and now >= self._resend_at:
            self._resend_at = now + self.timing.resend_s
            for held in self.rounds.values():
                if held.cut.stop and held.phase is Phase.KNOWN:
                    self._answer(held.cut.round)
        due = self._hold_due()
        if due is not None and now >= due:
            for held in self._holding():
                self.failed(held.cut.round, f"held a step for {self.timing.max_hold_s:g} s")

    def wake(self) -> float | None:
        """When `tick` has something to do."""
        times = [time for time in (self._resend_at, self._hold_due()) if time is not None]
        return min(times, default=None)

    def deadline(self) -> float | None:
        """The nearest deadline of a stopping round."""
        ends = [held.deadline for held in self.rounds.values() if held.deadline is not None]
        return min(ends, default=None)

    def fence(self) -> int:
        """Lock for good: after a loss only a stopping round lets updates begin."""
        self.is_fenced = True
        return self.gate.lock()

    def _unlock(self, stop: bool) -> None:
        if not stop and not self.is_fenced:
            self.gate.allow(OPEN)

    def _holding(self) -> list[Held]:
        open_rounds = [held for held in self.rounds.values() if not held.is_settled]
        if any(held.cut.stop for held in open_rounds):
            return []
        return [held for held in open_rounds if held.phase < Phase.CAPTURED]

    def _hold_due(self) -> float | None:
        if self.waiting_since is None:
            return None
        since = [max(self.waiting_since, held.decided_at) for held in self._holding()]
        return min(since) + self.timing.max_hold_s if since else None

    def _advance(self, held: Held, phase: Phase, why: str) -> None:
        held.phase, held.why = phase, why
        self._answer(held.cut.round)

    def _settle(self, held: Held, digest: str | None, why: str, now: float) -> None:
        held.is_settled, held.digest, held.why = True, digest, why
        self._actions.append(Settled(_at(held, now), digest, why))

    def _answer(self, number: int) -> None:
        held = self.rounds.get(number)
        if held is None:
            self._say(Report(number, Phase.KNOWN))
        else:
            self._say(Report(number, held.phase, 0, held.digest, held.why))

    def _forget_old(self) -> None:
        over = [number for number, held in self.rounds.items() if held.phase is Phase.KNOWN]
        for number in over[:-REMEMBERED_ROUNDS]:
            del self.rounds[number]


def _at(held: Held, now: float) -> Cut:
    if held.deadline is None:
        return held.cut
    return replace(held.cut, seconds_left=held.deadline - now)
