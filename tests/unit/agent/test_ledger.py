"""Slots held by the saver: nobody loses one, nobody has one twice, kept ones allow a retry."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spotspeed.agent.ledger import SlotLedger
from spotspeed.errors import FormatError

SLOTS = 5


class _Rank:
    def __init__(self) -> None:
        self.free = set(range(SLOTS))

    def receive(self, slots: Sequence[int]) -> None:
        assert not self.free & set(slots), "a slot came back twice"
        self.free |= set(slots)


def test_written_slots_are_kept_until_the_rank_needs_them() -> None:
    rank = _Rank()
    ledger = SlotLedger(SLOTS, rank.receive)
    ledger.take(1, [0, 1, 2])
    rank.free -= {0, 1, 2}
    ledger.written((0, 1))
    assert rank.free == {3, 4}
    assert ledger.is_repeatable(1)
    ledger.need(1)
    assert rank.free == {0, 3, 4}
    assert not ledger.is_repeatable(1)
    ledger.settle(1)
    assert rank.free == set(range(SLOTS))
    assert ledger.held_count == 0


def test_a_need_is_met_by_the_next_chunk_written() -> None:
    rank = _Rank()
    ledger = SlotLedger(SLOTS, rank.receive)
    ledger.take(1, range(SLOTS))
    rank.free.clear()
    ledger.need(1)
    ledger.written((4,))
    ledger.written((3,))
    assert rank.free == {4}


@pytest.mark.parametrize("slots", [[0], [SLOTS], [2, 2]])
def test_a_slot_that_is_not_the_ranks_is_refused(slots: list[int]) -> None:
    ledger = SlotLedger(SLOTS, _Rank().receive)
    ledger.take(1, [0])
    with pytest.raises(FormatError, match="is not the rank's"):
        ledger.take(2, slots)


class _Traffic(RuleBasedStateMachine):
    """Saves come and go in any order; every slot is always in exactly one place."""

    def __init__(self) -> None:
        super().__init__()
        self.rank = _Rank()
        self.ledger = SlotLedger(SLOTS, self.rank.receive)
        self.unwritten: list[tuple[int, int]] = []
        self.save = 1

    @precondition(lambda self: self.rank.free)
    @rule()
    def send(self) -> None:
        slot = min(self.rank.free)
        self.rank.free.remove(slot)
        self.ledger.take(self.save, [slot])
        self.unwritten.append((self.save, slot))

    @precondition(lambda self: self.unwritten)
    @rule()
    def write(self) -> None:
        self.ledger.written((self.unwritten.pop(0)[1],))

    @rule()
    def need(self) -> None:
        self.ledger.need(2)

    @rule()
    def settle(self) -> None:
        self.ledger.settle(self.save)
        self.unwritten = [pair for pair in self.unwritten if pair[0] != self.save]
        self.save += 1

    @invariant()
    def every_slot_is_somewhere(self) -> None:
        assert len(self.rank.free) + self.ledger.held_count == SLOTS


TestTraffic = _Traffic.TestCase
