"""The pieces that describe a rank's training state, without copying or communicating."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator

import torch

from spotspeed.core.interval import Interval
from spotspeed.core.layout import KIND_MASTER, KIND_WEIGHT, Fragment, Holding, TensorKey
from spotspeed.state.optimizers import rule_for, split_state, state_dtype
from spotspeed.state.partition import Layout, Partition, Resident, Slot
from spotspeed.state.piece import Piece, dtype_name, flat_elements, run_of
from spotspeed.state.weights import element_scope, underived

Where = tuple[str, str, tuple[int, ...], int, int]
"""Kind, name and shape of a tensor, and the range of its elements."""
HOLDINGS_KEPT = 1 << 16
"""Places that are remembered, at some 600 bytes each."""
SCALAR_BYTES = 8
"""At most so much is stored for one number of an optimizer's state."""


def live_pieces(layout: Layout) -> Iterator[Piece]:
    """Masters, optimizer state and frozen weights of this rank, in a fixed order."""
    optimizer = layout.optimizer
    for partition in layout.partitions():
        rule = rule_for(optimizer, partition.hyper)
        state = partition.state_in(optimizer)
        owner = partition.slots[0].name if partition.slots else "(padding)"
        shapes = {key: torch.Size([own.count]) for key, own in partition.own.items()}
        elementwise, scalars = split_state(state, rule, partition.master, owner, shapes)
        master = flat_elements(partition.master)
        for key, own in partition.own.items():
            made = elementwise.pop(key, None)
            if made is not None and own.is_made:
                for slot in own.held:
                    yield slot_piece(partition, slot, key, made)
        for slot in partition.slots:
            yield slot_piece(partition, slot, KIND_MASTER, master)
            for key, tensor in elementwise.items():
                yield slot_piece(partition, slot, key, tensor)
            if slot.interval.start == 0:
                for key, tensor in scalars.items():
                    yield scalar_piece(partition, slot.name, key, tensor)
    for resident in layout.residents():
        yield resident_piece(resident)


def underived_pieces(layout: Layout) -> Iterator[Piece]:
    """The low-precision weights that cannot be derived from their masters, slot by slot.

    Each is a tensor of its own, whole in itself, whose scope names the elements it stands for: no
    rank knows whether the rest of the parameter differs as well.
    """
    for partition, slot, weight in underived(layout.partitions()):
        key = TensorKey(KIND_WEIGHT, slot.name, element_scope(slot.interval))
        whole = Interval(0, slot.interval.count)
        fragment = Fragment(key, dtype_name(weight), (whole.count,), whole)
        holding = Holding(fragment, partition.replica_index, partition.replica_count)
        yield Piece(holding, weight)


def expected_bytes(layout: Layout, *, but: Container[str] = ()) -> int:
    """The bytes of this rank's shares when every master has all of its optimizer state.

    The optimizers make their state in the first step; this counts it also before. The parameters
    named in `but` are left out.
    """
    optimizer, total = layout.optimizer, 0
    for partition in layout.partitions():
        rule = rule_for(optimizer, partition.hyper)
        state = partition.state_in(optimizer)
        item_bytes = partition.master.element_size()
        for key in rule.elementwise:
            present, own = state.get(key), partition.own.get(key)
            later = state_dtype(partition.master, optimizer) if own is None else own.dtype
            dtype = later if present is None else present.dtype
            item_bytes += dtype.itemsize
        for slot in (slot for slot in partition.slots if slot.name not in but):
            share = slot.interval.split(partition.replica_count, partition.replica_index)
            total += share.count * item_bytes + len(rule.scalars) * SCALAR_BYTES
    residents = (resident_piece(resident).share for resident in layout.residents()
                 if resident.name not in but)  # fmt: skip
    return total + sum(piece.fragment.size_bytes for piece in residents)


def slot_piece(partition: Partition, slot: Slot, kind: str, elements: torch.Tensor) -> Piece:
    """The piece of one slot in a tensor that is laid out like the master."""
    run = run_of(elements, slot.offset, slot.interval)
    where = kind, slot.name, slot.shape, slot.interval.start, slot.interval.stop
    return _piece(where, run, partition.replica_index, partition.replica_count)


def scalar_piece(partition: Partition, name: str, key: str, value: torch.Tensor) -> Piece:
    """The piece of a number that the optimizer keeps per master."""
    where = key, name, (), 0, 1
    return _piece(where, value, partition.replica_index, partition.replica_count)


def resident_piece(resident: Resident) -> Piece:
    """The piece of a weight without an optimizer."""
    elements = flat_elements(resident.tensor).narrow(0, 0, resident.interval.count)
    interval = resident.interval
    where = KIND_WEIGHT, resident.name, resident.shape, interval.start, interval.stop
    return _piece(where, elements, resident.replica_index, resident.replica_count)


def _piece(where: Where, elements: torch.Tensor, index: int, count: int) -> Piece:
    return Piece(_holding(*where, dtype_name(elements), index, count), elements)


@functools.lru_cache(maxsize=HOLDINGS_KEPT)
def _holding(
    kind: str, name: str, shape: tuple[int, ...], start: int, stop: int, dtype: str, *replica: int
) -> Holding:
    """The same object for the same place: made once, and compared in no time at every save."""
    fragment = Fragment(TensorKey(kind, name), dtype, shape, Interval(start, stop))
    return Holding(fragment, *replica)
