"""How a global batch divides: among which ranks, and into which micro batches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Division:
    """What one rank computes of a global batch: so many micro batches of so many samples."""

    micro: int
    accumulation: int


def divisors(number: int) -> list[int]:
    """Every positive divisor of a positive number, ascending."""
    small = [low for low in range(1, int(number**0.5) + 1) if number % low == 0]
    return sorted({*small, *(number // low for low in small)})


def divide(train: int, ranks: int, *, micro: int) -> Division | None:
    """The division of `train` samples among `ranks` in micro batches of at most `micro`.

    The largest that fit: a rank never needs more memory than with `micro`. None when the samples do
    not divide by the ranks at all.
    """
    share, rest = divmod(train, ranks)
    if rest or not share:
        return None
    largest = max(size for size in divisors(share) if size <= max(1, micro))
    return Division(largest, share // largest)
