"""The low-precision copies of the masters: derived, compared bit for bit, overridden."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch

from spotspeed.core.interval import Interval
from spotspeed.state.partition import Partition, Slot
from spotspeed.state.piece import flat_elements, run_of, write_elements

HOST_ELEMENTS, DEVICE_ELEMENTS = 256 * 1024, 16 * 1024 * 1024
"""Elements that are cast and compared at a time: what a cache holds, what fills a device.

They bound the scratch memory of the comparison.
"""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_SCOPE = re.compile(r"elements-(\d+)-(\d+)")

Overrides = Mapping[tuple[str, int], torch.Tensor]
"""Low-precision elements that are not the cast master, by (name, first element)."""


def element_scope(interval: Interval) -> str:
    """The scope under which elements that are not derivable are stored."""
    return f"elements-{interval.start}-{interval.stop}"


def scope_elements(scope: str) -> Interval | None:
    """The elements that a scope stands for, or None when it is another kind of scope."""
    found = _SCOPE.fullmatch(scope)
    return Interval(int(found[1]), int(found[2])) if found else None


def derive_weights(partitions: Iterable[Partition]) -> None:
    """Round every master into its low-precision copy, in place."""
    for partition in partitions:
        master = flat_elements(partition.master)
        for slot in partition.slots:
            if slot.weight is not None:
                write_elements(slot.weight, run_of(master, slot.offset, slot.interval))


def override_weights(partitions: Iterable[Partition], overrides: Overrides) -> None:
    """Write the elements that are not derivable over the derived ones, in place."""
    for slot in (slot for partition in partitions for slot in partition.slots):
        for (name, start), elements in overrides.items():
            common = Interval(start, start + elements.numel()).intersect(slot.interval)
            if name != slot.name or common is None or slot.weight is None:
                continue
            whole = flat_elements(slot.weight)
            whole.narrow(0, common.start - slot.interval.start, common.count).copy_(
                elements.narrow(0, common.start - start, common.count)
            )
            if not slot.weight.is_contiguous():  # `whole` was a copy.
                write_elements(slot.weight, whole)


def underived(partitions: Iterable[Partition]) -> Iterator[tuple[Partition, Slot, torch.Tensor]]:
    """The slots whose low-precision bits are not those of the rounded master."""
    for partition in partitions:
        master = flat_elements(partition.master)
        for slot in partition.slots:
            if slot.weight is not None:
                weight = flat_elements(slot.weight)
                if not _is_cast(weight, run_of(master, slot.offset, slot.interval)):
                    yield partition, slot, weight


def _is_cast(weight: torch.Tensor, master: torch.Tensor) -> bool:
    if weight.data_ptr() == master.data_ptr() and weight.dtype == master.dtype:
        return True
    bits = _BITS[weight.element_size()]
    step = HOST_ELEMENTS if weight.device.type == "cpu" else DEVICE_ELEMENTS
    for start in range(0, weight.numel(), step):
        count = min(step, weight.numel() - start)
        expected = master.narrow(0, start, count).to(weight.dtype).to(weight.device)
        if not torch.equal(weight.narrow(0, start, count).view(bits), expected.view(bits)):
            return False
    return True
