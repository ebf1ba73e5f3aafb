"""The whole training state gathered from all ranks, and put back through a provider."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed import comm

from spotspeed.core.interval import Interval, gaps, overlaps
from spotspeed.core.layout import Extent, StoredTensor, TensorKey
from spotspeed.state.provider import Piece, StateProvider


@dataclass(slots=True)
class Snapshot:
    """Full logical tensors, flat, with their shape and the ranges that were written."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ranges: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """Gaps, double writes and disagreements that were found while gathering."""


def snapshot(provider: StateProvider) -> Snapshot:
    """Gather every share of every rank; the same result on all ranks. Collective."""
    pieces = [*provider.pieces(), *provider.derived_mismatches()]
    shares = [piece.share for piece in pieces]
    own = [
        (str(share.fragment.key), share.fragment.shape,
         (share.fragment.interval.start, share.fragment.interval.stop), share.tensor.clone())
        for share in shares
    ]  # fmt: skip
    gathered: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    found = Snapshot()
    for key, shape, (start, stop), values in (item for rank in gathered for item in rank):
        if key not in found.tensors:
            found.shapes[key], found.ranges[key] = shape, []
            found.tensors[key] = torch.zeros(torch.Size(shape).numel(), dtype=values.dtype)
        if found.shapes[key] != shape or found.tensors[key].dtype != values.dtype:
            found.faults.append(f"{key}: ranks disagree about shape or dtype")
        found.tensors[key][start:stop] = values
        if stop > start:
            found.ranges[key].append((start, stop))
    for key, ranges in found.ranges.items():
        whole = Interval(0, found.tensors[key].numel())
        intervals = [Interval(*item) for item in ranges]
        if gaps(whole, intervals) or overlaps(intervals):
            found.faults.append(f"{key}: not covered exactly once: {sorted(ranges)}")
    return found


def stored_tensors(state: Snapshot) -> dict[TensorKey, StoredTensor]:
    """The snapshot as a checkpoint's reader would describe it."""
    return {
        _key(key): StoredTensor(
            str(state.tensors[key].dtype).removeprefix("torch."), state.shapes[key],
            tuple(Extent(Interval(*item), 0, 0) for item in sorted(state.ranges[key])),
        )
        for key in state.tensors
    }  # fmt: skip


def fill(targets: list[Piece], state: Snapshot, *, but: str | None = None) -> None:
    """Write the snapshot into the targets through their bytes; the kind `but` is zeroed."""
    for piece in targets:
        key, interval = piece.fragment.key, piece.fragment.interval
        values = state.tensors[str(key)][interval.start : interval.stop]
        if key.kind == but:
            values = torch.zeros_like(values)
        piece.view()[:] = values.clone().view(torch.uint8).numpy().data


def restore(provider: StateProvider, state: Snapshot, *, but: str | None = None) -> None:
    """A whole restore from a snapshot. Collective."""
    targets = provider.prepare_restore(stored_tensors(state))
    fill(targets, state, but=but)
    provider.check_restore()
    provider.finish_restore()


def _key(text: str) -> TensorKey:
    kind, _, rest = text.partition(":")
    name, _, scope = rest.partition("@")
    return TensorKey(kind, name, scope)
