"""Half-open element ranges and the arithmetic that partitioning needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Interval:
    """Half-open element range [start, stop) of a flattened tensor; never reversed or negative."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"not a half-open range: [{self.start}, {self.stop})")

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    def intersect(self, other: Interval) -> Interval | None:
        """The common part, or None when there is none (an empty range shares nothing)."""
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return Interval(start, stop) if start < stop else None

    def contains(self, other: Interval) -> bool:
        """Whether every element of `other` lies in this range."""
        return other.count == 0 or (self.start <= other.start and other.stop <= self.stop)

    def split(self, parts: int, index: int) -> Interval:
        """Part `index` of `parts` consecutive ones that cover the range, sizes within one."""
        if not 0 <= index < parts:
            raise ValueError(f"part {index} of {parts}")
        return Interval(
            self.start + self.count * index // parts,
            self.start + self.count * (index + 1) // parts,
        )

    def shift(self, offset: int) -> Interval:
        """The range moved by `offset` elements."""
        return Interval(self.start + offset, self.stop + offset)


def gaps(whole: Interval, pieces: Iterable[Interval]) -> list[Interval]:
    """The maximal parts of `whole` that no piece covers, in order."""
    missing: list[Interval] = []
    position = whole.start
    for piece in sorted(pieces):
        common = piece.intersect(whole)
        if common is None:
            continue
        if common.start > position:
            missing.append(Interval(position, common.start))
        position = max(position, common.stop)
    if position < whole.stop:
        missing.append(Interval(position, whole.stop))
    return missing


def overlaps(pieces: Iterable[Interval]) -> list[Interval]:
    """The parts that more than one piece covers, in order."""
    doubled: list[Interval] = []
    reach = 0
    for piece in sorted(pieces):
        if piece.count and piece.start < reach:
            doubled.append(Interval(piece.start, min(piece.stop, reach)))
        reach = max(reach, piece.stop)
    return doubled
