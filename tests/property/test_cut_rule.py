"""The cut rule in thousands of simulated schedules, and proof that the simulator can tell.

The native machine and its Python reference run in lockstep. `pytest --hypothesis-seed=N` runs other
schedules than the fixed ones, SPOTSPEED_SCHEDULES so many (`make soak` does both).
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from spotspeed.testing.cut_lockstep import Lockstep
from spotspeed.testing.cut_scenario import Fault, Scenario, draw
from spotspeed.testing.cut_simulator import World, run, soak
from tests.property.wrong_rules import (
    WRONG_RULES,
    Patch,
    listening_to_the_lost,
    wait_for_the_stuck,
)

SCHEDULES = int(os.environ.get("SPOTSPEED_SCHEDULES", "10000"))
PATIENCE = 4_000
"""A wrong rule must be caught within so many schedules."""


@pytest.fixture
def first_seed(request: pytest.FixtureRequest) -> int:
    chosen = request.config.getoption("--hypothesis-seed")
    return int(chosen) * SCHEDULES if chosen and str(chosen).isdigit() else 0


def test_thousands_of_schedules_keep_every_promise(first_seed: int) -> None:
    assert soak(SCHEDULES, first_seed=first_seed, machine=Lockstep) == []


@pytest.mark.parametrize("kind", ["quiet", "lossy", "crash", "split", "suspicion"])
def test_large_jobs_keep_every_promise(kind: Any, first_seed: int) -> None:
    seeds = range(first_seed, first_seed + 8)
    found = [run(draw(seed, world_size=64, kind=kind), Lockstep) for seed in seeds]
    assert found == [None] * len(seeds)


@pytest.mark.parametrize("seed", [16, 17, 23])
def test_a_seed_replays_the_same_schedule(seed: int) -> None:
    assert trace(seed) == trace(seed)


def trace(seed: int) -> list[tuple[float, int, str]]:
    world, told = World(draw(seed)), []
    original = world.act

    def act(rank: Any, actions: Any) -> None:
        told.extend((world.now, rank.number, repr(action)) for action in actions)
        original(rank, actions)

    world.act = act  # type: ignore[method-assign]
    world.run()
    return told


@pytest.mark.parametrize("rule", WRONG_RULES, ids=lambda rule: rule.__name__)
def test_a_wrong_rule_is_caught(rule: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    rule(monkeypatch)
    assert any(run(draw(seed)) is not None for seed in range(PATIENCE))


def test_listening_to_the_lost_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(run(late_decision(seed)) for seed in range(500))
    listening_to_the_lost(monkeypatch)
    assert any(run(late_decision(seed)) for seed in range(PATIENCE))


def test_waiting_for_the_stuck_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(seed: int) -> Scenario:
        """A rank dies where messages take next to no time."""
        return replace(draw(seed, kind="crash"), delay_s=0.0005, spike=0.0)

    assert not any(run(crash(seed), Lockstep) for seed in range(300))
    wait_for_the_stuck(monkeypatch)
    assert any(run(crash(seed)) for seed in range(300))


def late_decision(seed: int) -> Scenario:
    """The leader dies while it tells a step, and slow links bring its words to a later term."""
    drawn = draw(seed, kind="crash")
    words = 1 + seed % (2 * drawn.world_size)
    death = Fault(0.0, (0,), sends=("Decide", words))
    return replace(drawn, spike=0.4, slow_share=0.3, save_fails=0.0, is_covered=True,
                   faults=(death,))  # fmt: skip
