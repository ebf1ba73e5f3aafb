"""Every order of events of two ranks, a save and a stop: no order breaks the cut rule.

Links are reliable and in order, time stands still (nothing is sent twice), everything else may
happen whenever it can. States are visited once; the whole space is walked.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from spotspeed.core.cut import CutMachine, State
from spotspeed.core.cut_actions import Capture, Departed, Send, Settled
from spotspeed.core.cut_messages import Cut, Wish

Event = tuple[str, int]


@dataclass
class Rank:
    machine: CutMachine
    step: int = 0
    entered: int = 0
    copying: list[Cut] = field(default_factory=list)
    writing: list[Cut] = field(default_factory=list)
    left_at: int | None = None


@dataclass
class World:
    """Two ranks, what is under way to each, what is still to be asked, and what was decided."""

    ranks: list[Rank]
    mail: list[list[Send]]
    asks: tuple[tuple[int, Wish], ...]
    last_step: int
    cuts: dict[int, tuple[int, bool]] = field(default_factory=dict)
    written: dict[int, set[int]] = field(default_factory=dict)

    def events(self) -> Iterator[Event]:
        yield from (("deliver", to) for to in (0, 1) if self.mail[to])
        yield from (("ask", index) for index in range(len(self.asks)))
        both = min(rank.entered for rank in self.ranks)
        for number, rank in enumerate(self.ranks):
            if rank.entered > rank.step and both >= rank.entered:
                yield "finish", number
            gate = rank.machine.gate
            may_enter = rank.entered == rank.step < self.last_step and rank.step + 1 <= gate.ceiling
            if may_enter and rank.left_at is None:
                yield "enter", number
            if rank.copying:
                yield "stage", number
            if rank.writing:
                yield "write", number

    def play(self, event: Event) -> None:
        kind, index = event
        if kind == "ask":
            number, wish = self.asks[index]
            self.asks = self.asks[:index] + self.asks[index + 1 :]
            self.act(number, self.ranks[number].machine.notice(wish, None, "test", 0.0))
            return
        rank = self.ranks[index]
        if kind == "deliver":
            mail = self.mail[index].pop(0)
            self.act(index, rank.machine.receive(1 - index, mail.term, mail.message, 0.0))
        elif kind == "enter":
            rank.entered += 1
            assert rank.machine.enter(rank.entered, 0.0)
            assert all(cut.step >= rank.entered for cut in rank.copying)
        elif kind == "finish":
            rank.step = rank.entered
            self.act(index, rank.machine.completed(rank.step, 0.0))
        elif kind == "stage":
            cut = rank.copying.pop(0)
            rank.writing.append(cut)
            self.act(index, rank.machine.staged(cut.round, 0.0))
        else:
            cut = rank.writing.pop(0)
            writers = self.written.setdefault(cut.round, set())
            writers.add(index)
            digest = "seal" if len(writers) == 2 else None
            self.act(index, rank.machine.durable(cut.round, digest, 0.0))

    def act(self, number: int, actions: list[Any]) -> None:
        rank = self.ranks[number]
        for action in actions:
            if isinstance(action, Send):
                self.mail[action.to].append(action)
            elif isinstance(action, Capture):
                cut = action.cut
                assert rank.step == rank.entered == cut.step
                assert self.cuts.setdefault(cut.round, (cut.step, cut.stop)) == (cut.step, cut.stop)
                rank.copying.append(cut)
            elif isinstance(action, Settled):
                if action.digest is None:
                    rank.copying = [cut for cut in rank.copying if cut.round != action.cut.round]
                self.act(number, rank.machine.delivered(action.cut.round, 0.0))
            elif isinstance(action, Departed):
                assert action.digest == "seal"
                rank.left_at = rank.step


ALL = [(snap, stop, 2) for snap in (0, 1) for stop in (0, 1)]


@pytest.mark.parametrize(
    ("snap", "stop", "last_step"),
    [pytest.param(*case, marks=pytest.mark.full) for case in [(0, 1, 1), *ALL]],
)
def test_every_order_ends_with_both_ranks_gone_at_one_sealed_step(
    snap: int, stop: int, last_step: int
) -> None:
    ranks = [Rank(CutMachine(number, 2, now=0.0)) for number in (0, 1)]
    first = World(ranks, [[], []], ((snap, Wish.SNAP), (stop, Wish.STOP)), last_step)
    seen, todo, ends = {pickle.dumps(first)}, [pickle.dumps(first)], 0
    while todo:
        state = todo.pop()
        events = list(pickle.loads(state).events())
        for event in events:
            world = pickle.loads(state)
            world.play(event)
            after = pickle.dumps(pickle.loads(pickle.dumps(world)))
            if after not in seen:
                seen.add(after)
                todo.append(after)
        if not events:
            ends += 1
            world = pickle.loads(state)
            assert [rank.machine.state for rank in world.ranks] == [State.LEFT, State.LEFT]
            assert len({rank.left_at for rank in world.ranks}) == 1
    assert ends > 0 and len(seen) > 1000
