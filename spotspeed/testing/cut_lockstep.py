"""Both cut machines, the Python reference and its native twin, as one that answers when they agree.

    violation = run(draw(seed), machine=Lockstep)

Every call goes to both. The messages of the native one travel as bytes of the wire, and every
action, every message and the observable state after every event must be the same.
"""

from __future__ import annotations

from typing import Any

from spotspeed import _native
from spotspeed.core.cut import CutMachine, State
from spotspeed.core.cut_actions import Action, Send, Timing
from spotspeed.core.cut_gate import Gate
from spotspeed.core.cut_member import Member
from spotspeed.core.cut_messages import Message, Phase, Term, Wish, encode
from spotspeed.core.cut_tuples import actions_of, timing_tuple
from spotspeed.testing.cut_judge import Violation


class Disagreement(Violation):
    """The twins do not do the same."""


class Lockstep:
    """A cut machine with the interface of `CutMachine`; every method may raise Disagreement."""

    def __init__(
        self, rank: int, world_size: int, *, now: float, position: int = 0,
        timing: Timing | None = None, unix_offset_s: float = 0.0,
    ) -> None:  # fmt: skip
        timing = timing or Timing()
        self.python = CutMachine(
            rank, world_size, now=now, position=position, timing=timing,
            unix_offset_s=unix_offset_s,
        )  # fmt: skip
        self.native = _native.CutMachine(
            rank, world_size, position=position, timing=timing_tuple(timing),
            unix_offset_s=unix_offset_s,
        )  # fmt: skip

    @property
    def gate(self) -> Gate:
        return self.python.gate

    @property
    def member(self) -> Member:
        return self.python.member

    @property
    def state(self) -> State:
        return self.python.state

    @property
    def term(self) -> Term:
        return self.python.term

    @property
    def lost(self) -> set[int]:
        return self.python.lost

    def notice(
        self, wish: Wish, seconds_left: float | None, source: str, now: float
    ) -> list[Action]:
        return self._compare(
            self.python.notice(wish, seconds_left, source, now),
            self.native.notice(int(wish), seconds_left, source, now),
        )

    def enter(self, position: int, now: float) -> bool:
        entered = self.python.enter(position, now)
        if self.native.enter(position, now) is not entered:
            raise Disagreement(f"update {position} may begin for one of the twins: {self}")
        self._compare([], [])
        return entered

    def completed(self, position: int, now: float) -> list[Action]:
        return self._compare(
            self.python.completed(position, now), self.native.completed(position, now)
        )

    def staged(self, number: int, now: float) -> list[Action]:
        return self._compare(self.python.staged(number, now), self.native.staged(number, now))

    def durable(self, number: int, digest: str | None, now: float) -> list[Action]:
        return self._compare(
            self.python.durable(number, digest, now), self.native.durable(number, digest, now)
        )

    def failed(self, number: int, why: str, now: float) -> list[Action]:
        return self._compare(
            self.python.failed(number, why, now), self.native.failed(number, why, now)
        )

    def delivered(self, number: int, now: float) -> list[Action]:
        return self._compare(self.python.delivered(number, now), self.native.delivered(number, now))

    def gather(self, label: str, value: bytes, now: float) -> tuple[int, list[Action]]:
        serial, actions = self.python.gather(label, value, now)
        other, theirs = self.native.gather(label, value, now)
        if serial != other:
            raise Disagreement(f"exchange {serial} and {other}: {self}")
        return serial, self._compare(actions, theirs)

    def missing(self) -> tuple[int, ...]:
        return self.python.missing()

    def peer_down(self, rank: int, why: str, now: float) -> list[Action]:
        return self._compare(
            self.python.peer_down(rank, why, now), self.native.peer_down(rank, why, now)
        )

    def tick(self, now: float) -> list[Action]:
        return self._compare(self.python.tick(now), self.native.tick(now))

    def wake(self) -> float | None:
        return self.python.wake()

    def receive(self, sender: int, term: Term, message: Message, now: float) -> list[Action]:
        data = encode(term, message)
        return self._compare(
            self.python.receive(sender, term, message, now), self.native.receive(sender, data, now)
        )

    def _compare(self, actions: list[Action], raw: list[tuple[Any, ...]]) -> list[Action]:
        found = [self._plain(each) for each in actions]
        if found != [each if each[0] == "Send" else actions_of([each])[0] for each in raw]:
            raise Disagreement(f"{self}: {found!r:.500} and {raw!r:.500}")
        state, theirs = observe(self.python), self.native.observe()
        if state != theirs:
            raise Disagreement(f"{self}: {state!r:.500} and {theirs!r:.500} after {found!r:.300}")
        return actions

    def _plain(self, action: Action) -> Any:
        """A Send as its bytes: what is compared is what would travel."""
        if isinstance(action, Send):
            return "Send", action.to, encode(action.term, action.message)
        return action

    def __repr__(self) -> str:
        return f"twins of rank {self.python.rank}"


def observe(machine: CutMachine) -> tuple[Any, ...]:
    """Everything in which the twins must agree after every event; see csrc/bindings_cut.cpp."""
    gate, member = machine.gate, machine.member
    rounds = [
        (number, int(held.phase), held.is_settled, held.deadline)
        for number, held in member.rounds.items()
    ]
    return (
        _STATES[machine.state], machine.missing(), (machine.term.counter, machine.term.leader),
        tuple(sorted(machine.lost)), (gate.started, gate.completed, gate.limit, gate.ceiling),
        member.top_round, member.is_fenced, member.waiting_since, rounds, machine.wake(),
    )  # fmt: skip


_STATES = {State.RUNNING: 1, State.CLOSED: 2, State.LEFT: 3}
assert set(Phase) == set(map(Phase, range(8)))
