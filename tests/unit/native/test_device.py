"""The CUDA side where there is no GPU, and the plain twin of the pack kernel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotspeed import _native
from spotspeed.staging.native import cuda_available, cuda_built, cuda_device_count

without_gpu = pytest.mark.skipif(cuda_available(), reason="this machine has a GPU")


@given(
    sizes=st.lists(st.integers(0, 200), max_size=20),
    gaps=st.lists(st.integers(0, 9), min_size=20, max_size=20),
    order=st.randoms(use_true_random=False),
)
def test_pack_puts_items_where_they_belong(sizes, gaps, order) -> None:
    sources = [np.full(size, 1 + index, np.uint8) for index, size in enumerate(sizes)]
    expected, items = np.zeros(sum(sizes) + sum(gaps), np.uint8), []
    offset = 0
    for source, gap in zip(sources, gaps, strict=False):
        offset += gap
        expected[offset : offset + source.size] = source
        items.append((source.ctypes.data, offset, source.size))
        offset += source.size
    order.shuffle(items)
    target = np.zeros_like(expected)
    _native.pack_host(items, target)
    assert np.array_equal(target, expected)


@pytest.mark.parametrize(
    "items", [[(4096, 1, 8)], [(4096, 9, 1)], [(0, 0, 1)], [(4096, 0, 5), (8192, 4, 4)]]
)
def test_pack_refuses_what_does_not_fit(items: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError):
        _native.pack_host(items, bytearray(8))


@without_gpu
def test_without_a_gpu_every_device_call_says_so() -> None:
    assert cuda_device_count() == 0
    with pytest.raises(_native.DeviceError):
        _native.DeviceCopyEngine(0)
    with pytest.raises(_native.DeviceError):
        _native.RegisteredMemory(4096, 4096, device=0)
    with pytest.raises(_native.DeviceError):
        _native.pack_device([(4096, 0, 8)], 8192, 8)
    if not cuda_built():
        with pytest.raises(_native.DeviceError, match="install nvcc and rebuild"):
            _native.DeviceCopyEngine(0)


@given(
    sizes=st.lists(st.integers(0, 300) | st.sampled_from([70_000, 200_000]), max_size=30),
    gaps=st.lists(st.integers(0, 20), min_size=30, max_size=30),
    buffer_bytes=st.sampled_from([0, 1000, 1 << 20]),
)
def test_the_plan_of_device_copies_brings_every_byte(sizes, gaps, buffer_bytes) -> None:
    sources = [np.full(size, 1 + index, np.uint8) for index, size in enumerate(sizes)]
    target = np.zeros(sum(sizes) + sum(gaps), np.uint8)
    expected, rows, offset = np.zeros_like(target), [], 0
    for source, gap in zip(sources, gaps, strict=False):
        offset += gap
        expected[offset : offset + source.size] = source
        rows.append((source.ctypes.data, target.ctypes.data + offset, source.size))
        offset += source.size
    engine = _native.TwinCopyEngine(buffer_bytes=buffer_bytes)
    handle = engine.submit(np.array(rows, np.uint64).reshape(-1, 3), keep=sources)
    assert handle.wait() == sum(sizes)
    assert handle.done()
    assert np.array_equal(target, expected)


@pytest.mark.parametrize(
    "copies",
    [np.zeros(3, np.uint64), np.zeros((1, 2), np.uint64), np.zeros((1, 3), np.uint32),
     np.zeros((1, 3), np.float64), np.zeros((2, 6), np.uint64)[:, ::2],
     np.array([[0, 4096, 8]], np.uint64)],
    ids=["flat", "columns", "width", "floats", "strided", "null"],
)  # fmt: skip
def test_arrays_that_are_no_copies_are_refused(copies) -> None:
    with pytest.raises(ValueError):
        _native.TwinCopyEngine().submit(copies)
    with pytest.raises(ValueError):
        _native.CopyEngine(1).submit(copies)
