"""Device copies and kernels on a real GPU: they agree with their plain twins byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spotspeed import _native
from spotspeed.staging.native import (
    Arena,
    DeviceCopyEngine,
    RegisteredMemory,
    cuda_available,
    cuda_built,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (cuda_available() and torch.cuda.is_available()),
        reason="no GPU that both this build and PyTorch can use",
    ),
]


def random_on_device(size: int, seed: int) -> torch.Tensor:
    values = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return torch.from_numpy(values).cuda()


def current_stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def test_copies_wait_for_the_stream_that_produced_the_data() -> None:
    size = 64 << 20
    arena = Arena.create(size)
    registered = RegisteredMemory(arena.address, size)
    engine = DeviceCopyEngine(0, streams=2)
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    for round_number in range(1, 20):
        source.fill_(round_number)
        half = size // 2
        handle = engine.submit(
            [
                (source.data_ptr(), arena.address, half),
                (source.data_ptr() + half, arena.address + half, half),
            ],
            after_stream=current_stream(),
            keep=(source, registered),
        )
        assert handle.wait() == size
        assert handle.done()
        assert (np.frombuffer(arena, np.uint8) == round_number).all()


@pytest.mark.parametrize("item", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("count", [1, 31, 100_003])
def test_plane_kernels_agree_with_their_twins(item: int, count: int) -> None:
    source = random_on_device(item * count, count)
    planes, back = torch.empty_like(source), torch.empty_like(source)
    stream = current_stream()
    _native.split_planes_device(source.data_ptr(), planes.data_ptr(), item, count, stream=stream)
    _native.join_planes_device(planes.data_ptr(), back.data_ptr(), item, count, stream=stream)
    expected = bytearray(item * count)
    _native.split_planes_scalar(source.cpu().numpy(), expected, item)
    assert planes.cpu().numpy().tobytes() == bytes(expected)
    assert torch.equal(back, source)


def test_the_pack_kernel_agrees_with_its_twin() -> None:
    random = np.random.default_rng(5)
    pool = random_on_device(1 << 20, 6)
    host_pool = pool.cpu().numpy()
    target = torch.zeros(4 << 20, dtype=torch.uint8, device="cuda")
    expected = np.zeros(4 << 20, dtype=np.uint8)
    device_items, host_items, offset = [], [], 0
    for _ in range(300):  # more than one launch's table
        size, start = int(random.integers(0, 9000)), int(random.integers(0, 1 << 19))
        device_items.append((pool.data_ptr() + start, offset, size))
        host_items.append((host_pool.ctypes.data + start, offset, size))
        offset += size + int(random.integers(0, 40))
    _native.pack_device(device_items, target.data_ptr(), target.numel(), stream=current_stream())
    _native.pack_host(host_items, expected)
    assert np.array_equal(target.cpu().numpy(), expected)


def test_host_addresses_are_no_kernel_targets() -> None:
    host = bytearray(64)
    address = np.frombuffer(host, np.uint8).ctypes.data
    with pytest.raises((ValueError, _native.DeviceError)):
        _native.split_planes_device(address, address + 32, 4, 8)
    assert cuda_built()
