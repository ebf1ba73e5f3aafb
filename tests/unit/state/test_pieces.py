"""Pieces, slots of flat partitions, and what the probe refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.superoffload.superoffload_stage3 import SuperOffloadOptimizer_Stage3

from spotspeed.core.interval import Interval
from spotspeed.core.layout import Extent, Fragment, Holding, StoredTensor, TensorKey
from spotspeed.errors import CaptureError, InvalidLayoutError, UnsupportedLayoutError
from spotspeed.state.capture import scalar_piece, slot_piece
from spotspeed.state.fit import check_parameters, is_same_dtype, optimizer_kinds, overrides
from spotspeed.state.flat import flat_slots
from spotspeed.state.partition import Partition, Slot
from spotspeed.state.piece import Piece, dtype_of, flat_elements, write_elements
from spotspeed.state.probe import check_geometry, refuse_unsupported, require

KEY = TensorKey("fp32", "layer.weight")


def _piece(tensor: torch.Tensor, index: int = 0, count: int = 1) -> Piece:
    dtype = str(tensor.dtype).removeprefix("torch.")
    fragment = Fragment(KEY, dtype, (100,), Interval(3, 3 + tensor.numel()))
    return Piece(Holding(fragment, index, count), tensor)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_of_replicas_make_up_the_piece(count: int) -> None:
    whole = torch.arange(5.0)
    shares = [_piece(whole, index, count).share for index in range(count)]
    assert torch.equal(torch.cat([share.tensor for share in shares]), whole)
    assert shares[0].fragment.interval.start == 3 and shares[-1].fragment.interval.stop == 8
    assert all(share.holding.replica_count == 1 for share in shares)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool, torch.int64])
def test_the_bytes_of_a_piece_are_those_of_the_tensor(dtype: torch.dtype) -> None:
    tensor = torch.zeros(6, dtype=dtype)
    view = _piece(tensor[2:5]).view()
    view[0] = 1
    assert len(view) == 3 * tensor.element_size() and not view.readonly
    assert tensor[2] != 0 and not tensor[:2].any() and not tensor[3:].any()


def test_a_piece_of_other_elements_than_its_fragment_is_refused() -> None:
    fragment = Fragment(KEY, "float32", (10,), Interval(0, 4))
    for tensor in (torch.zeros(5), torch.zeros(4, dtype=torch.float64), torch.zeros(2, 2),
                   torch.zeros(8)[::2]):  # fmt: skip
        with pytest.raises(CaptureError, match=r"fp32:layer.weight"):
            Piece(Holding(fragment), tensor)


def test_elements_are_in_logical_order_whatever_the_memory_format() -> None:
    tensor = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    assert flat_elements(tensor).tolist() == list(range(24))
    write_elements(tensor, torch.arange(24.0) * 2)
    assert flat_elements(tensor).tolist() == [2.0 * index for index in range(24)]


def test_a_dtype_that_torch_lacks_is_named() -> None:
    with pytest.raises(CaptureError, match="'float3'"):
        dtype_of("float3")


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("gap", [0, 3])
def test_flat_slots_of_all_ranks_cover_every_parameter_once(ranks: int, gap: int) -> None:
    shapes = [(7, 3), (1,), (), (5,), (2, 2, 2)]
    placed, offset = [], 0
    for index, shape in enumerate(shapes):
        placed.append((f"p{index}", shape, torch.arange(math.prod(shape)).view(shape), offset))
        offset += math.prod(shape) + gap
    size = -(-offset // ranks) + 1
    flat = torch.full((size * ranks,), -1)
    for _, _, values, start in placed:
        flat[start : start + values.numel()] = values.flatten()
    seen: dict[str, list[int]] = {name: [] for name, *_ in placed}
    for rank in range(ranks):
        part = flat[rank * size : (rank + 1) * size]
        for slot in flat_slots(placed, Interval(rank * size, (rank + 1) * size)):
            held = part[slot.offset : slot.offset + slot.interval.count]
            assert held.tolist() == list(range(slot.interval.start, slot.interval.stop))
            assert slot.weight is not None and torch.equal(slot.weight, held)
            seen[slot.name] += held.tolist()
    assert seen == {f"p{i}": list(range(math.prod(shape))) for i, shape in enumerate(shapes)}


def test_a_partition_with_elements_that_nobody_claims_is_refused() -> None:
    partition = Partition(torch.zeros(10), (Slot("a", (7,), Interval(0, 7), 0),), ("a",), {})
    check_geometry(partition, 3)
    with pytest.raises(UnsupportedLayoutError, match=r"10 elements holds 7 .* and 2 of padding"):
        check_geometry(partition, 2)


def test_missing_attributes_are_named_with_deepspeeds_version() -> None:
    with pytest.raises(UnsupportedLayoutError, match=r"SimpleNamespace of DeepSpeed .* has no b"):
        require(SimpleNamespace(a=1), "a", "b")


def _engine(**optimizer: Any) -> Any:
    return SimpleNamespace(
        optimizer=SimpleNamespace(**optimizer), mp_world_size=1, _config=SimpleNamespace(),
        module=torch.nn.Linear(2, 2),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"swap_optimizer": True}, "the state of SimpleNamespace on NVMe"),
        ({"params_in_nvme_and_cpu": True}, "parameters on NVMe"),
        ({"subgroup_to_device": {0: "cpu", 1: "cuda"}}, "offload_optimizer.ratio below 1"),
        ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights"),
    ],
)
def test_offload_that_is_not_supported_is_refused_by_name(
    setting: dict[str, Any], words: str
) -> None:
    refuse_unsupported(_engine(subgroup_to_device={0: "cpu"}))
    with pytest.raises(UnsupportedLayoutError, match=f"not supported: .*{words}.*; supported are"):
        refuse_unsupported(_engine(**setting))


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("has_moe_layers", True, "mixture of experts in ZeRO stage 3"),
        ("mp_world_size", 4, "tensor parallelism of 4 by something else"),
        ("zenflow", True, "ZenFlow"),
        ("optimizer", object.__new__(SuperOffloadOptimizer_Stage3), "SuperOffload"),
        ("_config", SimpleNamespace(compile_config=SimpleNamespace(
            deepcompile=True, offload_opt_states=True)), "DeepCompile's offload_opt_states"),
    ],
)  # fmt: skip
def test_parallelism_that_is_not_supported_is_refused_by_name(
    attribute: str, value: object, words: str
) -> None:
    engine = _engine()
    engine.zero_optimization_stage = lambda: 3
    setattr(engine, attribute, value)
    with pytest.raises(UnsupportedLayoutError, match=words):
        refuse_unsupported(engine)


def _stored(dtype: str, *shape: int) -> StoredTensor:
    return StoredTensor(dtype, shape, (Extent(Interval(0, math.prod(shape)), 0, 0),))


@pytest.mark.parametrize(
    ("stored", "live", "expected"),
    [
        ("float32", torch.float32, True), ("bfloat16", torch.float32, False),
        ("float16", torch.float32, False), ("float32", torch.float64, False),
        ("float32", torch.bfloat16, None), ("float16", torch.bfloat16, None),
        ("bfloat16", torch.float16, None), ("int64", torch.float32, None),
    ],
)  # fmt: skip
def test_only_conversions_that_keep_every_value_are_made(
    stored: str, live: torch.dtype, expected: bool | None
) -> None:
    if expected is None:
        with pytest.raises(UnsupportedLayoutError, match=f"stored as {stored}, here"):
            is_same_dtype(KEY, _stored(stored, 4), live)
    else:
        assert is_same_dtype(KEY, _stored(stored, 4), live) is expected


def test_an_error_lists_the_first_parameters_and_counts_the_rest() -> None:
    stored = {TensorKey("fp32", f"p{index}"): _stored("float32", 2) for index in range(9)}
    with pytest.raises(InvalidLayoutError) as caught:
        check_parameters(stored, {f"p{index}": (3,) for index in range(8)}, {})
    text = str(caught.value)
    assert "9 differences among 9 stored and 8 live parameters" in text
    assert "p0: stored shape (2,), here (3,)" in text and "and 4 more" in text


def test_tensors_of_a_part_of_the_job_are_refused() -> None:
    stored = {TensorKey("fp32", "a", "tp-1"): _stored("float32", 2)}
    with pytest.raises(UnsupportedLayoutError, match="fp32:a@tp-1"):
        check_parameters(stored, {"a": (2,)}, {})


def test_runs_of_underived_weights_are_found_by_their_scope() -> None:
    key = TensorKey("weight", "a", "elements-3-7")
    stored = {TensorKey("fp32", "a"): _stored("float32", 9), key: _stored("bfloat16", 4)}
    check_parameters(stored, {"a": (9,)}, {})
    assert overrides(stored) == {"a": [(Interval(3, 7), key)]}


def test_buffers_and_blobs_are_no_optimizer_state() -> None:
    keys = [("fp32", "a", ""), ("step", "a", ""), ("buffer", "b", "rank-0"), ("blob", "job", "")]
    stored = {TensorKey(*key): _stored("uint8", 1) for key in keys}
    assert optimizer_kinds(stored) == {"a": frozenset({"step"})}


def test_the_same_place_is_the_same_object_whatever_memory_holds_it() -> None:
    slot = Slot("layer.weight", (10,), Interval(2, 6), 0)
    made = []
    for value in (1.0, 2.0):
        master = torch.full((4,), value)
        partition = Partition(master, (slot,), ("layer.weight",), {}, 1, 2)
        step = scalar_piece(partition, "layer.weight", "step", torch.tensor([value]))
        pieces = [slot_piece(partition, slot, "fp32", master), step]
        assert all(torch.equal(piece.tensor, master[: len(piece.tensor)]) for piece in pieces)
        made.append([piece.holding for piece in pieces])
    assert all(first is second for first, second in zip(*made, strict=True))
    other = slot_piece(partition, replace(slot, interval=Interval(3, 7)), "fp32", master)
    assert other.holding.fragment.interval == Interval(3, 7)
