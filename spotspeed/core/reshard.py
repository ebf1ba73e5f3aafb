"""Which stored bytes fill which requests, whatever layout wrote them and whatever layout asks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from spotspeed.core.chunks import Entry
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Extent, Fragment, StoredTensor, TensorKey
from spotspeed.errors import InvalidLayoutError

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Transfer:
    """`size_bytes` bytes from `raw_offset` of a shard's stream go to `target_offset` of a request.

    `request` is the position of the fragment in what `plan_reads` was given.
    """

    shard: int
    raw_offset: int
    request: int
    target_offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Every wanted byte exactly once; transfers in order of shard and place in it."""

    transfers: tuple[Transfer, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes that are wanted."""
        return sum(transfer.size_bytes for transfer in self.transfers)

    def by_shard(self) -> dict[int, list[Transfer]]:
        """The transfers of each shard, in order of their place in it."""
        grouped: dict[int, list[Transfer]] = {}
        for transfer in self.transfers:
            grouped.setdefault(transfer.shard, []).append(transfer)
        return grouped


@dataclass(slots=True)
class _Differences:
    """What does not fit, collected so that one error can tell all of it."""

    missing: list[str] = field(default_factory=list)
    shape: list[str] = field(default_factory=list)
    dtype: list[str] = field(default_factory=list)
    gap: list[str] = field(default_factory=list)
    overlap: list[str] = field(default_factory=list)

    def raise_if_any(self) -> None:
        groups = (
            (self.missing, "not in the checkpoint"), (self.shape, "stored with another shape"),
            (self.dtype, "stored with another dtype"), (self.gap, "stored only in part"),
            (self.overlap, "stored more than once"),
        )  # fmt: skip
        lines = []
        for items, what in groups:
            if items:
                more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
                lines.append(f"{len(items)} {what}: {'; '.join(items[:_SHOWN])}{more}")
        if lines:
            raise InvalidLayoutError(
                "the checkpoint does not fit what is asked of it:\n  " + "\n  ".join(lines)
                + "\nLoad it into the model and optimizer that wrote it, or choose another "
                "checkpoint; `spotspeed show` lists what one holds."
            )  # fmt: skip


def gather(shards: Sequence[Sequence[Entry]]) -> dict[TensorKey, StoredTensor]:
    """The logical tensors that the entries of all shards make up; shard number = position.

    Raises InvalidLayoutError when shards describe a tensor differently or store a part twice.
    Parts that no shard stores are found by `plan_reads` when they are asked for.
    """
    differences = _Differences()
    described: dict[TensorKey, Fragment] = {}
    extents: dict[TensorKey, list[Extent]] = {}
    for shard, entries in enumerate(shards):
        for entry in entries:
            fragment = entry.fragment
            first = described.setdefault(fragment.key, fragment)
            if (first.dtype, first.shape) != (fragment.dtype, fragment.shape):
                kind = differences.dtype if first.dtype != fragment.dtype else differences.shape
                kind.append(f"{fragment.key} is {_form(first)} and, in shard {shard}, "
                            f"{_form(fragment)}")  # fmt: skip
            held = extents.setdefault(fragment.key, [])
            if fragment.interval.count:
                held.append(Extent(fragment.interval, shard, entry.raw_offset))
    tensors: dict[TensorKey, StoredTensor] = {}
    for key, first in described.items():
        ordered = sorted(extents[key], key=lambda extent: extent.interval)
        for before, after in pairwise(ordered):
            if after.interval.start < before.interval.stop:
                differences.overlap.append(
                    f"{key} from element {after.interval.start} in shards {before.shard} and "
                    f"{after.shard}"
                )
        tensors[key] = StoredTensor(first.dtype, first.shape, tuple(ordered))
    differences.raise_if_any()
    return tensors


def plan_reads(stored: Mapping[TensorKey, StoredTensor], wanted: Sequence[Fragment]) -> ReadPlan:
    """How `stored` fills each fragment of `wanted`; several may ask for the same bytes.

    Raises InvalidLayoutError naming the first tensors that are missing, stored with another shape
    or dtype, stored only in part or more than once, how many there are and what to do.
    """
    differences = _Differences()
    transfers: list[Transfer] = []
    for request, fragment in enumerate(wanted):
        tensor = stored.get(fragment.key)
        if tensor is None:
            differences.missing.append(f"{fragment.key} {_form(fragment)}")
        elif tensor.shape != fragment.shape:
            differences.shape.append(
                f"{fragment.key} stored {list(tensor.shape)}, wanted {list(fragment.shape)}"
            )
        elif tensor.dtype != fragment.dtype:
            differences.dtype.append(
                f"{fragment.key} stored {tensor.dtype}, wanted {fragment.dtype}"
            )
        else:
            transfers += _fill(request, fragment, tensor, differences)
    differences.raise_if_any()
    transfers.sort(key=lambda item: (item.shard, item.raw_offset, item.request))
    return ReadPlan(tuple(_merge(transfers)))


def uncovered(tensor: StoredTensor) -> Interval | None:
    """The first run of elements of `tensor` that no extent holds, or None when it is whole."""
    position = 0
    for extent in tensor.extents:
        if extent.interval.start > position:
            return Interval(position, extent.interval.start)
        position = max(position, extent.interval.stop)
    total = 1
    for length in tensor.shape:
        total *= length
    return Interval(position, total) if position < total else None


def _fill(
    request: int, fragment: Fragment, tensor: StoredTensor, differences: _Differences
) -> list[Transfer]:
    whole, item = fragment.interval, fragment.item_bytes
    transfers: list[Transfer] = []
    position = whole.start
    first = bisect_right(tensor.extents, position, key=lambda extent: extent.interval.stop)
    for extent in tensor.extents[first:]:
        if extent.interval.start >= whole.stop:
            break
        if extent.interval.start > position:
            differences.gap.append(f"{fragment.key} lacks [{position}, {extent.interval.start})")
        elif extent.interval.start < position and transfers:
            differences.overlap.append(f"{fragment.key} from element {extent.interval.start}")
        common = extent.interval.intersect(Interval(position, whole.stop))
        if common is None:
            continue
        transfers.append(
            Transfer(
                extent.shard,
                extent.raw_offset + (common.start - extent.interval.start) * item,
                request,
                (common.start - whole.start) * item,
                common.count * item,
            )
        )
        position = common.stop
    if position < whole.stop:
        differences.gap.append(f"{fragment.key} lacks [{position}, {whole.stop})")
    return transfers


def _merge(transfers: list[Transfer]) -> list[Transfer]:
    """Join transfers that continue each other in the shard and in the request."""
    merged: list[Transfer] = []
    for transfer in transfers:
        last = merged[-1] if merged else None
        if (
            last is not None
            and (last.shard, last.request) == (transfer.shard, transfer.request)
            and last.raw_offset + last.size_bytes == transfer.raw_offset
            and last.target_offset + last.size_bytes == transfer.target_offset
        ):
            merged[-1] = Transfer(
                last.shard, last.raw_offset, last.request, last.target_offset,
                last.size_bytes + transfer.size_bytes,
            )  # fmt: skip
        else:
            merged.append(transfer)
    return merged


def _form(fragment: Fragment) -> str:
    return f"{fragment.dtype}{list(fragment.shape)}"
