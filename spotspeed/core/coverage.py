"""Whether the shards of a save lack a part of a tensor, told from one number per shard.

Every place between two elements of a tensor has a pseudo-random number of 128 bits. An entry counts
as the number of its stop less that of its start, and the entry that holds the first element takes
away what the whole tensor must count as. Where entries follow each other without gap or overlap
all cancels: the numbers of all shards add up to zero. A gap, an overlap or a disagreement about
dtype or shape gives zero with a likelihood of 2^-128. What cannot be seen this way is a tensor that
no shard mentions, and one that several hold wholly (docs/FORMAT.md, "Coverage").
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import msgpack

from spotspeed.core.layout import Fragment

_MODULUS = 1 << 128


def coverage(fragments: Iterable[Fragment]) -> str:
    """The number of one shard that holds `fragments`, as 32 hexadecimal digits."""
    value = 0
    for fragment in fragments:
        interval, count = fragment.interval, math.prod(fragment.shape)
        start, stop = (_place(fragment, at) for at in (interval.start, interval.stop))
        value += stop - start
        if interval.start == 0 and (interval.count or not count):
            value -= (stop if interval.stop == count else _place(fragment, count)) - start
    return f"{value % _MODULUS:032x}"


def total(numbers: Iterable[str]) -> str:
    """The number of shards with these numbers together."""
    return f"{sum(int(number, 16) for number in numbers) % _MODULUS:032x}"


def covers(numbers: Iterable[str]) -> bool:
    """Whether shards with these numbers lack no part of a tensor and hold none twice."""
    return int(total(numbers), 16) == 0


def _place(fragment: Fragment, element: int) -> int:
    key = fragment.key
    what = [key.kind, key.name, key.scope, fragment.dtype, list(fragment.shape), element]
    return int.from_bytes(hashlib.sha256(msgpack.packb(what)).digest()[:16], "big")
