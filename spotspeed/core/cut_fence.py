"""What the survivors of a loss do next, decided from what each of them knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spotspeed.core.cut_messages import Cut, Outcome, Phase, RoundView, Status


@dataclass(frozen=True, slots=True)
class Plan:
    """`step` is the newest update any survivor has begun; all of them are locked.

    `ended`: rounds whose outcome is told to everybody. `adopted`: a stopping round to go on with.
    Neither holds a stopping round: a new one is begun at `step`.
    """

    step: int
    next_round: int
    seconds_left: float | None
    ended: tuple[tuple[Cut, Outcome], ...]
    adopted: Cut | None

    @property
    def is_stopped(self) -> bool:
        return self.adopted is not None or any(outcome.stop for _, outcome in self.ended)


def plan_after_loss(statuses: Mapping[int, Status], why: str) -> Plan:
    """A known outcome is kept. A decided stop is gone on with where the survivors stand at it.

    Otherwise they stop at the newest step that one of them has begun: an older one is overwritten
    there. Saves that nobody stops for end without an outcome; what is staged may still be sealed.
    """
    step = max(status.started for status in statuses.values())
    views: dict[int, list[RoundView]] = {}
    for _, status in sorted(statuses.items()):
        for view in status.rounds:
            views.setdefault(view.cut.round, []).append(view)
    ended: list[tuple[Cut, Outcome]] = []
    adopted: Cut | None = None
    for number, seen in sorted(views.items(), reverse=True):
        cut = seen[0].cut
        known = [view for view in seen if view.phase is Phase.KNOWN]
        if len(known) == len(statuses) and not cut.stop:
            continue
        if known:
            ended.append((cut, Outcome(number, cut.stop, known[0].digest, known[0].why)))
        elif cut.stop and cut.step == step and adopted is None:
            adopted = cut
        else:
            ended.append((cut, Outcome(number, False, None, why)))
    left = [status.seconds_left for status in statuses.values() if status.seconds_left is not None]
    top = max(status.top_round for status in statuses.values())
    return Plan(step, top + 1, min(left, default=None), tuple(ended), adopted)
