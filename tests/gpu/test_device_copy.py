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
    registered = RegisteredMemory(arena.address, size, device=torch.cuda.current_device())
    engine = DeviceCopyEngine(0, streams=2)
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    for round_number in range(1, 20):
        source.fill_(round_number)
        half, event = size // 2, torch.cuda.Event()
        event.record()
        rows = [
            (source.data_ptr(), arena.address, half),
            (source.data_ptr() + half, arena.address + half, half),
        ]
        handle = engine.submit(
            np.array(rows, np.uint64),
            after_event=event.cuda_event,
            keep=(source, registered, event),
        )
        assert handle.wait() == size
        assert handle.done()
        assert (np.frombuffer(arena, np.uint8) == round_number).all()


@pytest.mark.parametrize("streams", [1, 3])
def test_the_engine_agrees_with_its_twin(streams: int) -> None:
    random = np.random.default_rng(9)
    pool = random_on_device(24 << 20, 10)
    host_pool = pool.cpu().numpy()
    targets = [np.zeros(64 << 20, np.uint8) for _ in range(2)]
    rows, offset = [], 0
    for number in range(3000):
        size = int(random.integers(0, 9_000_000 if number % 500 == 0 else 3000))
        start = int(random.integers(0, 14 << 20))
        rows.append((start, offset, size))
        offset += size + int(random.integers(0, 20))
    assert offset < targets[0].size
    copies = np.array(rows, np.uint64)
    base = np.array([[pool.data_ptr(), targets[0].ctypes.data, 0]], np.uint64)
    DeviceCopyEngine(0, streams=streams).submit(copies + base, keep=pool).wait()
    base = np.array([[host_pool.ctypes.data, targets[1].ctypes.data, 0]], np.uint64)
    _native.TwinCopyEngine().submit(copies + base).wait()
    assert np.array_equal(*targets)


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
    host = np.zeros(64, np.uint8)
    with pytest.raises((ValueError, _native.DeviceError)):
        _native.pack_device([(host.ctypes.data, 0, 8)], host.ctypes.data + 32, 8)
    assert cuda_built()
