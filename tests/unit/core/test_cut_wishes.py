"""Wishes for a stop that come while a save is agreed on are one stop, and soon; both twins."""

from __future__ import annotations

from typing import Any

from spotspeed.core.cut_actions import Send
from spotspeed.core.cut_messages import Notice, Outcome, Phase, Prepare, Report, Term, Wish
from spotspeed.testing.cut_lockstep import Lockstep

TERM = Term(0, 0)


def told(actions: list[Any], kind: type) -> list[tuple[int, Any]]:
    return [(action.to, action.message) for action in actions
            if isinstance(action, Send) and isinstance(action.message, kind)]  # fmt: skip


def failed_save() -> Lockstep:
    """The leader of three ranks, whose save of round 1 has failed before rank 2 knew its step."""
    leader = Lockstep(0, 3, now=0.0)
    leader.notice(Wish.SNAP, None, "periodic", 0.0)
    for rank in (1, 2):
        leader.receive(rank, TERM, Report(1, Phase.LOCKED, 0), 0.1)
    ended = leader.receive(1, TERM, Report(1, Phase.FAILED, 0, None, "disk full"), 0.2)
    assert {to for to, _ in told(ended, Outcome)} == {1, 2}
    return leader


def stop(leader: Lockstep, sender: int, serial: int, left: float | None) -> list[Any]:
    return leader.receive(sender, TERM, Notice(serial, Wish.STOP, left, "signal"), 0.3)


def test_a_stop_waits_for_who_must_still_hear_the_step_and_no_longer() -> None:
    leader = failed_save()
    assert not told(stop(leader, 1, 1, 120.0), Prepare)
    begun = leader.receive(2, TERM, Report(1, Phase.DECIDED, 0), 0.4)
    assert told(begun, Prepare) == [(1, Prepare(2)), (2, Prepare(2))]


def test_wishes_for_a_stop_are_one_round_with_the_sooner_deadline() -> None:
    leader = failed_save()
    for sender, left in ((1, 120.0), (2, 5.0)):
        assert not told(stop(leader, sender, 1, left), Prepare)
    assert told(leader.receive(2, TERM, Report(1, Phase.DECIDED, 0), 0.4), Prepare)
    assert not told(stop(leader, 1, 2, 120.0), Prepare)
    ended = {message for _, message in told(leader.tick(5.4), Outcome)}
    assert Outcome(2, True, None, "the deadline has come") in ended
    assert {outcome.round for outcome in ended} == {1, 2}
