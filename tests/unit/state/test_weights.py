"""Deriving, comparing and overriding low-precision weights."""

from __future__ import annotations

import pytest
import torch

from spotspeed.core.interval import Interval
from spotspeed.state import weights
from spotspeed.state.partition import Partition, Slot
from spotspeed.state.weights import derive_weights, override_weights, underived


def _partition(master: torch.Tensor, *copies: torch.Tensor) -> Partition:
    """Slots of the sizes of `copies`, one after the other from element 1 of the master on."""
    slots, offset = [], 1
    for index, copy in enumerate(copies):
        interval = Interval(10, 10 + copy.numel())
        slots.append(Slot(f"p{index}", (99,), interval, offset, copy))
        offset += copy.numel()
    return Partition(master, tuple(slots), tuple(slot.name for slot in slots), {})


def _names(partition: Partition) -> list[str]:
    return [slot.name for _, slot, _ in underived([partition])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_derived_weights_are_underived_nowhere(dtype: torch.dtype) -> None:
    master = torch.randn(12, generator=torch.Generator().manual_seed(1))
    master[3], master[4], master[5] = float("nan"), -0.0, float("inf")
    partition = _partition(master, torch.zeros(4, dtype=dtype), torch.zeros(7, dtype=dtype))
    assert _names(partition) == ["p0", "p1"]
    derive_weights([partition])
    assert _names(partition) == []


def test_one_differing_bit_is_found_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "HOST_ELEMENTS", 4)
    for index in range(11):
        copy = torch.zeros(11, dtype=torch.bfloat16)
        partition = _partition(torch.zeros(12), copy)
        assert _names(partition) == []
        copy[index] = -0.0
        assert _names(partition) == ["p0"]


def test_a_master_that_is_the_weight_itself_needs_no_comparison() -> None:
    master = torch.ones(4)
    partition = Partition(master, (Slot("a", (4,), Interval(0, 4), 0, master),), ("a",), {})
    assert _names(partition) == []


def test_overrides_reach_the_slots_they_overlap() -> None:
    first, second = torch.zeros(4, dtype=torch.bfloat16), torch.zeros(7, dtype=torch.bfloat16)
    partition = _partition(torch.zeros(12), first, second)
    overrides = {
        ("p0", 8): torch.tensor([1, 2, 3, 4], dtype=torch.bfloat16),
        ("p1", 16): torch.tensor([5, 6], dtype=torch.bfloat16),
        ("p2", 10): torch.tensor([7], dtype=torch.bfloat16),
    }
    override_weights([partition], overrides)
    assert first.tolist() == [3, 4, 0, 0]
    assert second.tolist() == [0, 0, 0, 0, 0, 0, 5]


def test_weights_that_are_not_contiguous_are_written_in_logical_order() -> None:
    master = torch.arange(6.0).view(2, 3)
    copy = torch.zeros(3, 2, dtype=torch.float16).t()
    partition = Partition(master, (Slot("a", (2, 3), Interval(0, 6), 0, copy),), ("a",), {})
    derive_weights([partition])
    assert copy.tolist() == master.tolist() and _names(partition) == []
    override_weights([partition], {("a", 4): torch.tensor([9.0], dtype=torch.float16)})
    assert copy.tolist() == [[0, 1, 2], [3, 9, 5]] and _names(partition) == ["a"]
