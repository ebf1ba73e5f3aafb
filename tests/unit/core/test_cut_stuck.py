"""Who is stuck inside an update after a loss is given up soon, who copies is not; both twins."""

from __future__ import annotations

from typing import Any

from spotspeed.core.cut_actions import Capture, Departed, Settled, Timing
from spotspeed.testing.cut_lockstep import Lockstep

TIMING = Timing(settle_s=15.0, stuck_s=0.5)
LONG_COPY_S = 10.0


def survivor(started: int, completed: int) -> Lockstep:
    """Rank 0 of two: rank 1 is lost at time 1."""
    machine = Lockstep(0, 2, now=0.0, timing=TIMING)
    for position in range(1, started + 1):
        assert machine.enter(position, 0.0)
        if position <= completed:
            machine.completed(position, 0.0)
    return machine


def of(kind: type, actions: list[Any]) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]


def test_a_survivor_inside_an_update_is_given_up_after_stuck_s() -> None:
    machine = survivor(started=3, completed=2)
    assert not of(Settled, machine.peer_down(1, "gone", 1.0))
    assert not of(Settled, machine.tick(1.0 + TIMING.stuck_s - 0.01))
    (settled,) = of(Settled, machine.tick(1.0 + TIMING.stuck_s))
    assert (settled.cut.step, settled.digest) == (3, None)
    assert settled.why == "a survivor is stuck in its update"
    assert of(Departed, machine.delivered(settled.cut.round, 2.0))


def test_an_update_that_ends_in_time_is_saved() -> None:
    machine = survivor(started=3, completed=2)
    machine.peer_down(1, "gone", 1.0)
    (capture,) = of(Capture, machine.completed(3, 1.4))
    assert not of(Settled, machine.tick(1.0 + LONG_COPY_S))
    machine.staged(capture.cut.round, 1.0 + LONG_COPY_S)
    (settled,) = of(Settled, machine.durable(capture.cut.round, "seal", 12.0))
    assert settled.digest == "seal"


def test_a_survivor_at_rest_may_copy_for_longer_than_stuck_s() -> None:
    machine = survivor(started=3, completed=3)
    (capture,) = of(Capture, machine.peer_down(1, "gone", 1.0))
    assert not of(Settled, machine.tick(1.0 + LONG_COPY_S))
    machine.staged(capture.cut.round, 1.0 + LONG_COPY_S)
    (settled,) = of(Settled, machine.durable(capture.cut.round, "seal", 12.0))
    assert settled.digest == "seal"
