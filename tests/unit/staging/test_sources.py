"""What is copied into the slots is exactly the raw stream, and changes to it are noticed."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spotspeed.core.chunks import pack
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.errors import CaptureError
from spotspeed.staging.check import Mode, Window
from spotspeed.staging.copy_plan import CopyPlan, Geometry, Origin
from spotspeed.staging.native import CopyEngine
from spotspeed.staging.sources import gather

ENGINE = CopyEngine(1)
CHUNK = 4096


def _tensor(name: str, values: torch.Tensor) -> tuple[Fragment, torch.Tensor]:
    dtype = str(values.dtype).removeprefix("torch.")
    count = values.numel()
    return Fragment(TensorKey("fp32", name), dtype, (count,), Interval(0, count)), values


@given(
    counts=st.lists(st.integers(0, 3000), max_size=8),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]), min_size=8),
    blob=st.binary(max_size=100),
)
def test_the_slots_hold_the_raw_stream_and_zeros_between(
    counts: list[int], dtypes: list[torch.dtype], blob: bytes
) -> None:
    pieces = [
        _tensor(f"w{number}", (torch.arange(count) % 199 + number).to(dtype))
        for number, (count, dtype) in enumerate(zip(counts, dtypes, strict=False))
    ]
    fragments, sources = gather(pieces, {TensorKey("blob", "rank"): blob})
    layout = pack(fragments, chunk_bytes=CHUNK)
    expected = bytearray(layout.raw_bytes)
    contents = [tensor.view(torch.uint8).numpy().tobytes() for _, tensor in pieces] + [blob]
    for entry, number in zip(layout.entries, layout.sources, strict=True):
        expected[entry.raw_offset : entry.raw_stop] = contents[number]
    for chunk in layout.chunks:
        slot: np.ndarray[Any, Any] = np.full(CHUNK, 0xA5, dtype=np.uint8)
        plan = CopyPlan(Origin(Geometry.of(layout), sources))
        plan.add(chunk, slot.ctypes.data)
        plan.run(ENGINE, lambda handle: None)
        assert bytes(slot[: chunk.size_bytes]) == expected[chunk.raw_offset : chunk.raw_stop]
        assert (slot[chunk.size_bytes :] == 0xA5).all(), "written behind the chunk"


@pytest.mark.parametrize("tensor", [
    torch.zeros(9), torch.zeros(10, dtype=torch.float16), torch.zeros(20)[::2],
], ids=["count", "dtype", "strided"])  # fmt: skip
def test_a_tensor_that_is_not_its_fragment_is_refused(tensor: torch.Tensor) -> None:
    fragment = Fragment(TensorKey("fp32", "w"), "float32", (10,), Interval(0, 10))
    with pytest.raises(CaptureError, match="fp32:w"):
        gather([(fragment, tensor)], {})


@pytest.mark.parametrize(("mode", "is_caught"), [("off", False), ("sampled", True), ("full", True)])
def test_a_tensor_changed_inside_the_window_is_named(mode: Mode, is_caught: bool) -> None:
    pieces = [_tensor(f"w{number}", torch.zeros(1000)) for number in range(5)]
    fragments, sources = gather(pieces, {})
    window = Window(fragments, sources, mode, seed=1)
    window.verify()
    pieces[3][1].fill_(1.0)
    if is_caught:
        with pytest.raises(CaptureError, match="fp32:w3"):
            window.verify()
    else:
        window.verify()


def test_what_is_described_later_is_watched_as_well() -> None:
    early, late = ([_tensor(name, torch.zeros(1000))] for name in ("early", "late"))
    window = Window(*gather(early, {}), "full", seed=1)
    window.join(Window(*gather(late, {}), "full", seed=1))
    window.verify()
    late[0][1][7] = 1.0
    with pytest.raises(CaptureError, match=r"1 of 2 .*fp32:late"):
        window.verify()


def test_only_the_full_check_sees_every_byte() -> None:
    pieces = [_tensor("w", torch.zeros(1_000_000))]
    fragments, sources = gather(pieces, {})
    window = Window(fragments, sources, "full", seed=1)
    pieces[0][1][777_777] = 1.0
    with pytest.raises(CaptureError):
        window.verify()


def test_the_copies_read_the_tensors_own_memory() -> None:
    tensor = torch.arange(4, dtype=torch.int64)
    _, sources = gather([_tensor("w", tensor)], {})
    target = (ctypes.c_char * 16)()
    sources[0].read(ctypes.addressof(target), 8, 16)
    assert bytes(target) == tensor.numpy().tobytes()[8:24]


class SlowQueue:
    """A device whose copies are over only when they have been waited for."""

    def __init__(self) -> None:
        self.begun = self.waited = 0

    def queue(self, device: torch.device, after: Any) -> SlowQueue:
        return self

    def lock(self, device: torch.device, address: int, size_bytes: int) -> None:
        return None

    def submit(self, copies: Any, tensors: Any) -> SlowQueue:
        self.begun += len(copies)
        return self

    def wait(self) -> None:
        self.waited += 1


def test_after_an_error_no_copy_of_a_device_is_left_on_its_way() -> None:
    device = SlowQueue()
    blob = {TensorKey("blob", "rank"): b"some"}
    fragments, sources = gather([_tensor("w", torch.zeros(8))], blob, engines=device)
    layout = pack(fragments, chunk_bytes=CHUNK)
    plan = CopyPlan(Origin(Geometry.of(layout), sources))
    slots: list[np.ndarray[Any, Any]] = [np.empty(CHUNK, dtype=np.uint8) for _ in layout.chunks]
    for chunk, slot in zip(layout.chunks, slots, strict=True):
        plan.add(chunk, slot.ctypes.data)

    def fail(handle: object) -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        plan.run(ENGINE, fail)
    assert (device.begun, device.waited) == (1, 1)
