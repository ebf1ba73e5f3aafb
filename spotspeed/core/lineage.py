"""Which checkpoints lead to the state the job is in: the path of epochs behind the newest one.

Epoch n+1 begins at the checkpoint it restored. What epoch n sealed above that step was never
continued from: it is off the lineage, ignored by restores and collected in time. Epochs between
the restored one and n+1 are off altogether. The rule is applied again from there, back to the first
epoch or to one that began with nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from spotspeed.errors import FormatError

_DIRECTORY = re.compile(r"step-(\d{12,16})\.e(\d{6,16})\.([A-Za-z0-9][A-Za-z0-9._+=-]{0,199})")


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A checkpoint's place in the history: of which epoch, at which step."""

    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class Lineage:
    """Per epoch on the path, the highest step that counts; None where there is no bound."""

    limits: Mapping[int, int | None]

    def holds(self, place: Place) -> bool:
        """Whether a checkpoint at `place` leads to the newest epoch."""
        if place.epoch not in self.limits:
            return False
        limit = self.limits[place.epoch]
        return limit is None or place.step <= limit


def trace_lineage(newest_epoch: int, restored: Mapping[int, Place | None]) -> Lineage:
    """The path behind `newest_epoch`.

    `restored` maps an epoch to the place it began from, None when it began with nothing. An epoch
    without an entry has restored nothing that is known (it died first, or is about to choose) and
    bounds nothing: the path goes on with the epoch before it. Raises FormatError when an epoch
    claims to have begun from itself or a later one.
    """
    limits: dict[int, int | None] = {}
    epoch, limit = newest_epoch, None
    while epoch >= 1:
        limits[epoch] = limit
        if epoch not in restored:
            epoch -= 1
            continue
        origin = restored[epoch]
        if origin is None:
            break
        if not 1 <= origin.epoch < epoch:
            raise FormatError(
                f"epoch {epoch} is recorded as restored from epoch {origin.epoch}, which is not "
                f"before it"
            )
        limit = origin.step if limit is None else min(limit, origin.step)
        epoch = origin.epoch
    return Lineage(limits)


def place_of(directory: str) -> Place | None:
    """The place that a checkpoint directory's name states, or None if it is not such a name.

    The name is `Ticket.directory`'s; whether a checkpoint is there is another matter.
    """
    match = _DIRECTORY.fullmatch(directory)
    if match is None or ".." in directory:
        return None
    return Place(epoch=int(match[2]), step=int(match[1]))
