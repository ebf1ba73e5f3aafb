"""Every stored type becomes numpy with exactly its values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spotspeed.checkpoint.arrays import to_numpy
from spotspeed.core.layout import ITEM_BYTES

TORCH = {name: getattr(torch, name) for name in ITEM_BYTES}


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_every_type_reads_as_torch_wrote_it(dtype):
    width = ITEM_BYTES[dtype]
    if width == 1:
        data = bytes(range(2)) if dtype == "bool" else bytes(range(256))
    elif width == 2:
        data = np.arange(1 << 16, dtype="<u2").tobytes()
    else:
        data = np.random.default_rng(3).bytes(width * 1000)
    tensor = torch.frombuffer(bytearray(data), dtype=TORCH[dtype])
    array = to_numpy(data, dtype)
    if dtype == "bfloat16" or dtype.startswith("float8"):
        assert array.dtype == np.float32
        expected = tensor.to(torch.float32).numpy()
        # torch may quiet a signalling NaN on the way; every number must be the same.
        assert np.array_equal(np.isnan(array), np.isnan(expected))
        number = ~np.isnan(expected)
        assert np.array_equal(array.view(np.uint32)[number], expected.view(np.uint32)[number])
    else:
        assert array.itemsize == width and array.tobytes() == data
        assert array.tobytes() == tensor.numpy().tobytes()
