"""Where DeepSpeed's flat optimizer partitions hold each parameter, by arithmetic alone.

The same rules that DeepSpeed's optimizers follow: runtime/zero/stage_1_and_2.py and
runtime/bf16_optimizer.py (flattening to a multiple of twice the number of ranks),
runtime/zero/stage3.py (`_create_fp16_sub_groups`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from spotspeed.core.interval import Interval

_ALIGNMENT_PER_RANK = 2
"""`nccl_start_alignment_factor`: the flat group is a multiple of this many elements a rank."""

Counts = Mapping[str, int]
"""Number of elements of each parameter, by name."""


@dataclass(frozen=True, slots=True)
class Span:
    """Elements `interval` of parameter `name`, from element `offset` of the partition on."""

    name: str
    interval: Interval
    offset: int


@dataclass(frozen=True, slots=True)
class FlatPartition:
    """One master tensor of one rank: its size in elements and what lies in it."""

    size: int
    spans: tuple[Span, ...]
    names: tuple[str, ...]
    """All parameters of the group, also those that lie on other ranks."""
    group: int
    """The param_group it belongs to."""

    @property
    def padding(self) -> int:
        """Elements after the last parameter's; those between parameters are not counted."""
        return self.size - max((s.offset + s.interval.count for s in self.spans), default=0)


def dealt_out(names: Sequence[str], ranks: int) -> list[str]:
    """The order of a group under `round_robin_gradients`: dealt out to the ranks like cards."""
    return [name for rank in range(ranks) for name in names[rank::ranks]]


def gathered(names: Sequence[str], ranks: int) -> list[str]:
    """The order that `dealt_out` was given, from the order that it made."""
    order = dealt_out([str(index) for index in range(len(names))], ranks)
    original = dict(zip(map(int, order), names, strict=True))
    return [original[index] for index in range(len(names))]


def partitions_12(
    groups: Sequence[Sequence[str]], counts: Counts, ranks: int, rank: int,
    paddings: Sequence[Sequence[int]] | None = None,
) -> list[FlatPartition]:  # fmt: skip
    """ZeRO-1, ZeRO-2 and BF16_Optimizer: each group is one run of elements, cut into equal parts.

    `paddings` are the elements after each parameter, where parameters are aligned.
    """
    found = []
    for index, names in enumerate(groups):
        gaps = [0] * len(names) if paddings is None else list(paddings[index])
        sizes = [counts[name] + gap for name, gap in zip(names, gaps, strict=True)]
        offsets = [0, *accumulate(sizes)]
        alignment = _ALIGNMENT_PER_RANK * ranks
        size = math.ceil(offsets[-1] / alignment) * alignment // ranks
        owned = Interval(rank * size, (rank + 1) * size)
        spans = []
        for name, offset in zip(names, offsets, strict=False):
            common = Interval(offset, offset + counts[name]).intersect(owned)
            if common is not None:
                spans.append(Span(name, common.shift(-offset), common.start - owned.start))
        found.append(FlatPartition(size, tuple(spans), tuple(names), index))
    return found


def partitions_3(
    groups: Sequence[Sequence[str]], counts: Counts, ranks: int, rank: int,
    sub_group_size: int | None,
) -> list[FlatPartition]:  # fmt: skip
    """ZeRO-3: each parameter is sharded by itself, shards are collected into sub-groups.

    Without `sub_group_size` each group is taken as the one sub-group that it is.
    """
    found = []
    for index, names in enumerate(groups):
        for members in _sub_groups(names, counts, ranks, sub_group_size):
            spans, offset = [], 0
            for name in members:
                shard = shard_size(counts[name], ranks)
                start = min(rank * shard, counts[name])
                interval = Interval(start, min(start + shard, counts[name]))
                if interval.count:
                    spans.append(Span(name, interval, offset))
                offset += shard
            found.append(FlatPartition(offset, tuple(spans), tuple(members), index))
    return found


def shard_size(count: int, ranks: int) -> int:
    """Elements of one rank's shard of a parameter under ZeRO-3, padding included."""
    return -(-count // ranks)


def _sub_groups(
    names: Sequence[str], counts: Counts, ranks: int, sub_group_size: int | None
) -> list[list[str]]:
    sizes = [shard_size(counts[name], ranks) for name in names]
    if sub_group_size is None or sub_group_size >= sum(sizes):
        return [list(names)]
    found: list[list[str]] = [[]]
    filled = 0
    for name, size in zip(names, sizes, strict=True):
        if filled >= sub_group_size:
            found.append([])
            filled = 0
        found[-1].append(name)
        filled += size
    return found
