"""The native cut machine and its Python reference do the same, whatever happens to them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotspeed import _native
from spotspeed.core.cut_actions import Timing
from spotspeed.core.cut_gather import WITHDRAWN
from spotspeed.core.cut_messages import (
    Closed,
    ClosedHeard,
    Cut,
    Decide,
    Fence,
    Gather,
    Gathered,
    Heard,
    Leave,
    Message,
    Notice,
    Outcome,
    Phase,
    Prepare,
    Report,
    RoundView,
    Status,
    Suspect,
    Term,
    Wish,
    decode,
    encode,
)
from spotspeed.errors import FormatError
from spotspeed.testing.cut_lockstep import Disagreement, Lockstep
from spotspeed.testing.cut_scenario import draw
from spotspeed.testing.cut_simulator import run
from tests.property.wrong_rules import WRONG_RULES, Patch

SIZE = 4
WORDS = ("", "a", "seal", "rank 1: disk full", "ü\U0001f600", "x" * 5000)


class Babel:
    """Draws messages that may be said, and calls that may be made, whether they fit or not."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def small(self) -> int:
        return self.rng.choice((0, 1, 1, 2, 2, 3, 3, 4, 5, 2**62))

    def left(self) -> float | None:
        return self.rng.choice((None, 0.5, 5.0, 120.0))

    def word(self) -> str:
        return self.rng.choice(WORDS)

    def digest(self) -> str | None:
        return self.rng.choice((None, None, *WORDS[:3]))

    def ranks(self) -> tuple[int, ...]:
        return tuple(self.rng.sample(range(SIZE), self.rng.randint(0, 2)))

    def cut(self) -> Cut:
        return Cut(
            self.small(), self.small(), self.rng.random() < 0.5, self.word(), self.small(),
            self.word(), self.left(), self.ranks(),
        )  # fmt: skip

    def phase(self) -> Phase:
        return self.rng.choice(list(Phase))

    def view(self) -> RoundView:
        return RoundView(self.cut(), self.phase(), self.digest(), self.word())

    def message(self) -> Message:
        rng, small, word, ranks = self.rng, self.small, self.word, self.ranks
        stop = rng.random() < 0.5
        return rng.choice((
            Notice(small(), Wish(rng.randint(1, 3)), self.left(), word()), Heard(small()),
            Prepare(small()), Decide(self.cut()), Closed(), ClosedHeard(),
            Report(small(), self.phase(), small(), self.digest(), word()),
            Report(small(), Phase.LOCKED, small()),
            Outcome(small(), stop, self.digest(), word()), Leave(small(), self.digest(), word()),
            Suspect(ranks(), word()), Fence(ranks(), word()),
            Status(small(), small(), self.left(), tuple(self.view() for _ in range(stop * 2))),
            Gather(rng.randint(0, 6), rng.choice("aab"), b"value"),
            Gathered(small(), (b"1", b"", b"22"), word() if stop else "", ranks()),
        ))  # fmt: skip

    def term(self, known: Term) -> Term:
        fresh = Term(known.counter + 1, self.rng.randrange(SIZE))
        return self.rng.choice((known, known, known, fresh))


def converse(seed: int, steps: int) -> None:
    """Make `steps` calls on both twins; raises Disagreement."""
    babel = Babel(seed)
    rng = babel.rng
    timing = Timing(max_hold_s=rng.choice((0.5, 30.0)), stuck_s=rng.choice((0.3, 5.0)))
    twins = Lockstep(rng.choice((0, 0, 1, 2)), SIZE, now=0.0, timing=timing, unix_offset_s=1.7e9)
    now, calls = 0.0, (
        lambda: twins.notice(Wish(rng.randint(1, 3)), babel.left(), babel.word(), now),
        lambda: twins.enter(babel.small(), now),
        lambda: twins.completed(twins.gate.started, now),
        lambda: twins.staged(babel.small(), now),
        lambda: twins.durable(babel.small(), babel.digest(), now),
        lambda: twins.failed(babel.small(), babel.word(), now),
        lambda: twins.delivered(babel.small(), now),
        lambda: twins.gather(rng.choice(("a", "b", WITHDRAWN)), b"mine", now),
        lambda: twins.tick(now),
    )  # fmt: skip
    for _ in range(steps):
        now += rng.choice((0.0, 0.0, 0.1, 0.3, 4.0))
        others = [rank for rank in range(SIZE) if rank != twins.python.rank]
        if rng.random() < 0.02:
            twins.peer_down(rng.choice(others), babel.word(), now)
        elif rng.random() < 0.5:
            spoken = encode(babel.term(twins.term), babel.message())
            term, message = decode(spoken, source="babel")
            twins.receive(rng.choice((term.leader, *others)), term, message, now)
        else:
            rng.choice(calls)()


@pytest.mark.parametrize("first", range(0, 2000, 500))
def test_the_twins_answer_any_conversation_alike(first: int) -> None:
    for seed in range(first, first + 500):
        try:
            converse(seed, 60)
        except Disagreement as found:
            pytest.fail(f"seed {seed}: {str(found)[:2000]}")


@pytest.mark.parametrize("rule", WRONG_RULES, ids=lambda rule: rule.__name__)
def test_a_rule_that_one_twin_alone_breaks_is_noticed(
    rule: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule(monkeypatch)
    found = (run(draw(seed), Lockstep) for seed in range(500))
    assert any("twins of rank" in told for told in found if told is not None)


MESSAGES = st.integers(0, 2**32).map(lambda seed: Babel(seed).message())


@given(MESSAGES, st.integers(0, 2**63 - 1), st.integers(0, 2**31))
def test_the_twins_write_the_same_bytes(message: Message, counter: int, leader: int) -> None:
    data = encode(Term(counter, leader), message)
    assert _native.reencode_message(data) == data


@given(MESSAGES, st.data())
def test_the_twins_take_and_refuse_the_same_bytes(message: Message, data: Any) -> None:
    spoilt = bytearray(encode(Term(1, 2), message)[:300])
    for _ in range(data.draw(st.integers(0, 3))):
        index = data.draw(st.integers(0, len(spoilt) - 1))
        spoilt[index] = data.draw(st.integers(0, 255))
    del spoilt[data.draw(st.integers(1, len(spoilt))) :]
    try:
        expected = encode(*decode(bytes(spoilt), source="test"))
    except FormatError:
        with pytest.raises(_native.MessageFormatError):
            _native.reencode_message(bytes(spoilt))
    else:
        assert _native.reencode_message(bytes(spoilt)) == expected
