"""What must hold in every schedule of the cut simulator, checked at every event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spotspeed.core.cut import State
from spotspeed.core.cut_actions import Departed, Send, Settled
from spotspeed.core.cut_messages import Cut, Decide, Term, Wish
from spotspeed.testing.cut_scenario import Ask, Scenario

if TYPE_CHECKING:
    from spotspeed.testing.cut_simulator import Rank


SHORT_DELAY_S = 0.005
"""Messages that take so long at most do not decide how long survivors wait."""
LET_GO_S = 1.0
"""What finding the loss, agreeing after it and telling the outcome may take then."""


class Violation(Exception):
    """An invariant does not hold."""


class Judge:
    """Watches the ranks of one schedule; every method raises Violation."""

    def __init__(self, scenario: Scenario, ranks: Sequence[Rank]) -> None:
        self.scenario = scenario
        self.ranks = ranks
        self.has_loss = False
        self.broke_at: float | None = None
        self.seals: dict[str, int] = {}
        self._stops: dict[Term, int] = {}
        self._cuts: dict[str, Cut] = {}
        self._outcomes: dict[tuple[int, str], str | None] = {}
        self._by_attempt: dict[tuple[Term, str], str | None] = {}
        self._by_term: dict[Term, str | None] = {}
        self._departures: dict[int, Departed] = {}
        self._promised_stop: set[int] = set()

    @property
    def is_faulty(self) -> bool:
        """Whether ranks may see different ends: of a crash, or when a LEAVE was lost for good."""
        return bool(self.scenario.faults) or self.has_loss

    def asked(self, ask: Ask, rank: Rank, now: float) -> None:
        """A stop asked for before this rank has closed must not be forgotten."""
        if ask.wish is Wish.STOP and not rank.is_closing:
            self._promised_stop.add(rank.number)

    def entered(self, rank: Rank, step: int) -> None:
        limit = self._stops.get(rank.machine.term)
        if limit is not None and step > limit:
            raise Violation(f"rank {rank.number} entered {step} after a stop at {limit}")
        for held in rank.machine.member.rounds.values():
            if held.cut.step < step and held.cut.stop and not held.is_settled:
                raise Violation(f"rank {rank.number} entered {step} past stop {held.cut}")
        for cut in rank.copying.values():
            if cut.step < step:
                raise Violation(f"rank {rank.number} entered {step} while {cut} was copied")

    def sent(self, rank: Rank, action: Send) -> None:
        if isinstance(action.message, Decide):
            cut = action.message.cut
            self._same_cut(cut)
            if cut.stop:
                limit = self._stops.setdefault(action.term, cut.step)
                if limit != cut.step:
                    raise Violation(f"two stops in one term: {limit} and {cut.step}")

    def captures(self, rank: Rank, cut: Cut) -> None:
        self._same_cut(cut)
        self._holds(rank, cut)

    def captured(self, rank: Rank, cut: Cut) -> None:
        self._holds(rank, cut)

    def sealed(self, cut: Cut, receipts: dict[int, int]) -> None:
        if set(receipts.values()) != {cut.step}:
            raise Violation(f"{cut} was sealed over versions {receipts}")
        self.seals[cut.attempt] = cut.step

    def settled(self, rank: Rank, action: Settled) -> None:
        cut, digest = action.cut, action.digest
        key = (rank.number, cut.attempt)
        if key in self._outcomes:
            raise Violation(f"rank {rank.number} was told the outcome of {cut} twice")
        self._outcomes[key] = digest
        if "has begun already" in action.why:
            raise Violation(f"rank {rank.number}: a step was chosen that is past: {action}")
        if digest is not None and self.seals.get(cut.attempt) != cut.step:
            raise Violation(f"rank {rank.number}: {cut} is said to be sealed and is not")
        if not self.is_faulty and action.why != "left before the outcome was known":
            known = self._by_attempt.setdefault((rank.machine.term, cut.attempt), digest)
            if known != digest:
                raise Violation(f"two outcomes of {cut}: {known} and {digest}")

    def departed(self, rank: Rank, action: Departed, now: float) -> None:
        self._departures[rank.number] = action
        self._let_go_in_time(rank, now)
        machine = rank.machine
        known = [key for key, digest in self._outcomes.items() if digest is not None
                 and key[0] == rank.number and self._cuts[key[1]].stop]  # fmt: skip
        if known and action.digest is None:
            raise Violation(f"rank {rank.number} knew {known} and left with {action}")
        if action.round:
            told = self._by_term.setdefault(machine.term, action.digest)
            if told != action.digest:
                raise Violation(f"rank {rank.number} leaves with {action}, another with {told}")
        if action.digest is not None:
            attempt = action.digest.removeprefix("seal of ")
            if self.seals.get(attempt) != rank.step or machine.gate.started != rank.step:
                raise Violation(f"rank {rank.number} left at {rank.step}, sealed {self.seals}")
        for other in self.ranks:
            if other.number in machine.lost or not other.is_alive or other is rank:
                continue
            theirs = other.machine
            if theirs.term != machine.term or theirs.state is not State.RUNNING:
                continue
            held = theirs.member.rounds.get(action.round)
            if action.round and held is not None and not held.is_settled:
                raise Violation(f"rank {rank.number} left before rank {other.number} knew")
            if action.round and held is None and action.digest is not None:
                raise Violation(f"rank {rank.number} left, rank {other.number} has no {action}")

    def _let_go_in_time(self, rank: Rank, now: float) -> None:
        """A survivor inside an update that a dead rank never ends is not kept there for long.

        Counted from the crash, or from the last end of a process that had left before it knew.
        """
        scenario, gate = self.scenario, rank.machine.gate
        if self.broke_at is None or scenario.spike or scenario.delay_s > SHORT_DELAY_S:
            return
        waited_s = now - self.broke_at
        if gate.started > gate.completed and waited_s > scenario.timing.stuck_s + LET_GO_S:
            raise Violation(f"rank {rank.number} was stuck for {waited_s:.1f} s after the crash")

    def exited(self, rank: Rank, now: float) -> None:
        """Who leaves in its own time tells nobody more, and is waited for until it is gone."""
        if self.broke_at is not None and rank.number in self._departures:
            self.broke_at = now

    def closed(self, rank: Rank) -> None:
        for other in self.ranks:
            if not other.is_closing and other.is_alive and other.number not in rank.machine.lost:
                raise Violation(f"rank {rank.number} closed before rank {other.number}")

    def at_end(self, now: float) -> None:
        """Everybody who lives has left or closed, for a reason, in time."""
        for rank in self.ranks:
            if rank.is_alive:
                raise Violation(
                    f"rank {rank.number} is stuck at step {rank.step} ({rank.machine.state}, "
                    f"waits at {rank.waits_at}, ceiling {rank.machine.gate.ceiling}) at {now:.1f} s"
                )
        if self.has_loss and self.scenario.kind == "quiet":
            raise Violation("a rank was given up, and nothing was wrong with it")
        if self.is_faulty:
            return
        if self._promised_stop and not self._departures:
            raise Violation(f"ranks {sorted(self._promised_stop)} asked for a stop; none came")
        if not self._departures and any(rank.step != self.scenario.steps for rank in self.ranks):
            raise Violation("the training ended early")
        if self._departures:
            self._all_left_alike()

    def _all_left_alike(self) -> None:
        ends = {(rank.step, rank.number in self._departures) for rank in self.ranks}
        digests = {action.digest for action in self._departures.values()}
        if len(digests) != 1 or {left for _, left in ends} != {True}:
            raise Violation(f"the ranks left differently: {ends} {digests}")
        if digests != {None} and len({step for step, _ in ends}) != 1:
            raise Violation(f"the ranks left at different steps: {ends}")
        calm = self.scenario.kind == "quiet" and not self.scenario.save_fails
        patient = all(ask.seconds_left in (None, 120.0) for ask in self.scenario.asks)
        if calm and patient and digests == {None}:
            raise Violation(f"nothing went wrong, yet no save: {self._departures}")

    def _same_cut(self, cut: Cut) -> None:
        facts = (cut.step, cut.stop, cut.created_unix_s, cut.round)
        known = self._cuts.setdefault(cut.attempt, cut)
        if (known.step, known.stop, known.created_unix_s, known.round) != facts:
            raise Violation(f"one name, two cuts: {known} and {cut}")

    def _holds(self, rank: Rank, cut: Cut) -> None:
        gate = rank.machine.gate
        if not rank.step == cut.step == gate.started:
            raise Violation(
                f"rank {rank.number} copies {rank.step} (begun {gate.started}) as {cut}"
            )
