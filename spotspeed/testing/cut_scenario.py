"""Draws one schedule for the cut simulator from a seed: who is slow, what is asked, what breaks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from spotspeed.core.cut_actions import Timing
from spotspeed.core.cut_messages import Wish

Kind = Literal["quiet", "lossy", "crash", "split", "suspicion"]
HORIZON_S = 400.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One wish of one rank; the same (source, at_s) on several ranks is one forwarded signal."""

    at_s: float
    rank: int
    wish: Wish
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class Fault:
    """Ranks `ranks` crash, are cut off for `lasts_s`, or are falsely given up by `by`.

    With `takes_saver` the whole node dies: its saver, and messages that are under way. A crash
    with `sends` comes when the rank has sent so many messages of that type, in a broadcast perhaps.
    """

    at_s: float
    ranks: tuple[int, ...]
    lasts_s: float = 0.0
    by: int = -1
    takes_saver: bool = False
    sends: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that is fixed before the first event. Times are seconds of simulated time."""

    seed: int
    kind: Kind
    world_size: int
    steps: int
    delay_s: float
    spike: float
    loss: float
    step_s: float
    update_s: float
    stage_s: float
    write_s: float
    slow_share: float
    is_covered: bool
    waits_for_seal: bool
    save_fails: float
    is_mesh: bool
    peer_timeout_s: float
    timing: Timing
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...] = field(default=())


def draw(seed: int, *, world_size: int | None = None, kind: Kind | None = None) -> Scenario:
    """The schedule of that seed; the same for ever unless this function changes."""
    rng = random.Random(seed)
    kinds: list[Kind] = ["quiet", "lossy", "crash", "split", "suspicion"]
    chosen = rng.choices(kinds, (40, 25, 20, 8, 7))[0]
    chosen = kind or chosen
    size = world_size or rng.choice((2, 2, 2, 3, 3, 3, 4, 4, 5, 6))
    steps = rng.randint(1, 8)
    step_s = rng.choice((0.002, 0.02, 0.1, 0.5))
    delay_s = rng.choice((0.0005, 0.005, 0.05, 0.2))
    span_s = steps * step_s * 1.5
    timing = Timing(
        resend_s=0.2, poll_s=3.0, max_hold_s=rng.choice((0.5, 5.0, 30.0)), settle_s=3.0,
        linger_s=1.0,
    )  # fmt: skip
    return Scenario(
        seed=seed, kind=chosen, world_size=size, steps=steps, delay_s=delay_s,
        spike=rng.choice((0.0, 0.0, 0.1)),
        loss=rng.choice((0.05, 0.2, 0.4)) if chosen == "lossy" else 0.0,
        step_s=step_s, update_s=step_s * rng.choice((0.01, 0.2, 1.0)),
        stage_s=rng.choice((0.0, 0.3, 1.0, 3.0)) * step_s, write_s=rng.choice((0.5, 3.0)) * step_s,
        slow_share=rng.choice((0.0, 0.1)), is_covered=rng.random() < 0.3,
        waits_for_seal=rng.random() < 0.5, save_fails=rng.choice((0.0, 0.0, 0.0, 0.15)),
        is_mesh=rng.random() < 0.3, peer_timeout_s=2.0, timing=timing,
        asks=_asks(rng, size, span_s), faults=_faults(rng, chosen, size, span_s),
    )  # fmt: skip


def _asks(rng: random.Random, size: int, span_s: float) -> tuple[Ask, ...]:
    asks = [Ask(rng.uniform(0, span_s), rng.randrange(size), Wish.SNAP, None)
            for _ in range(rng.choice((0, 1, 1, 2, 4)))]  # fmt: skip
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        at_s = rng.choice((0.0, rng.uniform(0, span_s), rng.uniform(0, span_s)))
        left = rng.choice((None, 120.0, 120.0, rng.uniform(0, span_s)))
        for rank in rng.sample(range(size), rng.choice((1, 1, 2, size))):
            for _ in range(rng.choice((1, 1, 2))):
                asks.append(Ask(at_s + rng.uniform(0, 0.002), rank, Wish.STOP, left))
    return tuple(asks)


def _faults(rng: random.Random, kind: Kind, size: int, span_s: float) -> tuple[Fault, ...]:
    if kind == "crash":
        count = rng.choice((1, 1, 1, 2))
        victims = [0 if rng.random() < 0.4 else rng.randrange(size) for _ in range(count)]
        return tuple(Fault(rng.uniform(0, 1.3 * span_s), (rank,), takes_saver=rng.random() < 0.4,
                           sends=_moment(rng) if rng.random() < 0.5 else None)
                     for rank in victims)  # fmt: skip
    if kind == "split":
        away = tuple(rng.sample(range(size), rng.randint(1, size - 1)))
        return (Fault(rng.uniform(0, span_s), away, rng.choice((0.3, 1.5, 10.0, 300.0))),)
    if kind == "suspicion":
        one, other = rng.sample(range(size), 2)
        if rng.random() < 0.6:
            one, other = max(one, 1), 0
        return (Fault(rng.uniform(0, span_s), (other,), by=one),) if one != other else ()
    return ()


def _moment(rng: random.Random) -> tuple[str, int]:
    kinds = ("Prepare", "Decide", "Outcome", "Leave", "Report", "Fence", "Status", "Closed")
    return rng.choice(kinds), rng.randint(1, 6)
