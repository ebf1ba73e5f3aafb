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
        _native.RegisteredMemory(4096, 4096)
    with pytest.raises(_native.DeviceError):
        _native.pack_device([(4096, 0, 8)], 8192, 8)
    with pytest.raises(_native.DeviceError):
        _native.split_planes_device(4096, 8192, 4, 8)
    if not cuda_built():
        with pytest.raises(_native.DeviceError, match="install nvcc and rebuild"):
            _native.join_planes_device(4096, 8192, 4, 8)


@pytest.mark.parametrize(
    "arguments",
    [(4096, 8192, 3, 8), (0, 8192, 4, 8), (4096, 4100, 4, 8), (4096, 8192, 4, 2**62)],
    ids=["item", "null", "overlap", "size"],
)
def test_device_planes_check_before_they_launch(arguments: tuple[int, int, int, int]) -> None:
    for transform in (_native.split_planes_device, _native.join_planes_device):
        with pytest.raises(ValueError):
            transform(*arguments)
