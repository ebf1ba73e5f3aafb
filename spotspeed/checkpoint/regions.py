"""Targets that lie side by side in memory, taken as one, so that one read may fill several.

The parameters of a flat partition are neighbours in memory as they are in the shard: joined, their
chunks can be read straight to where they belong.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spotspeed.core.reshard import Transfer


@dataclass(frozen=True, slots=True)
class Regions:
    """Runs of memory, and for each target the run it lies in and where."""

    views: list[memoryview]
    """Borrowed: they are valid for as long as the targets are."""
    places: list[tuple[int, int]]

    def move(self, transfers: Iterable[Transfer]) -> list[Transfer]:
        """The transfers into regions in place of targets; what goes on in both becomes one."""
        moved: list[Transfer] = []
        for transfer in transfers:
            region, offset = self.places[transfer.request]
            placed = replace(
                transfer, request=region, target_offset=offset + transfer.target_offset
            )
            if moved and _goes_on(moved[-1], placed):
                size = moved[-1].size_bytes + placed.size_bytes
                moved[-1] = replace(moved[-1], size_bytes=size)
            else:
                moved.append(placed)
        return moved


def join(targets: Sequence[memoryview]) -> Regions:
    """The regions of writable buffers of bytes that do not overlap."""
    starts = [_address(target) for target in targets]
    views: list[memoryview] = []
    places = [(0, 0)] * len(targets)
    group: list[int] = []

    def end_group() -> None:
        if len(group) == 1:
            views.append(targets[group[0]])
        elif group:
            size = starts[group[-1]] + len(targets[group[-1]]) - starts[group[0]]
            memory = (ctypes.c_ubyte * size).from_address(starts[group[0]])
            views.append(memoryview(memory).cast("B"))
        group.clear()

    by_address = sorted(
        (start, len(target), index)
        for index, (start, target) in enumerate(zip(starts, targets, strict=True))
    )
    for start, _, index in by_address:
        if group and start != starts[group[-1]] + len(targets[group[-1]]):
            end_group()
        group.append(index)
        places[index] = len(views), start - starts[group[0]]
    end_group()
    return Regions(views, places)


def _address(target: memoryview) -> int:
    return int(np.frombuffer(target, np.uint8).__array_interface__["data"][0])


def _goes_on(last: Transfer, following: Transfer) -> bool:
    """Whether `following` directly follows `last`, in the shard and in its region."""
    return (
        (following.shard, following.request) == (last.shard, last.request)
        and following.raw_offset == last.raw_offset + last.size_bytes
        and following.target_offset == last.target_offset + last.size_bytes
    )
