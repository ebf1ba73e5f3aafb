"""Numbers of one float type as the bytes of another, rounded as torch rounds, without torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from spotspeed.checkpoint.arrays import to_numpy

_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
ROUNDED = ("float64", "float32", "float16", "bfloat16")
"""The types that `round_to` can make."""


def is_float(dtype: str) -> bool:
    """Whether `dtype` is one of the format's real floating-point types."""
    return dtype in _FLOATS


def round_to(data: bytes | bytearray | memoryview, source: str, target: str) -> bytes | memoryview:
    """`data`, little-endian elements of `source`, as elements of `target`.

    Rounds to the nearest, ties to even, as `torch.Tensor.to` does on a CPU; a NaN stays one.
    Equal types give `data` itself. Raises ValueError for a target that is not one of ROUNDED.
    """
    if source == target:
        return memoryview(data)
    if target not in ROUNDED or not is_float(source):
        raise ValueError(f"{source} cannot be rounded to {target}")
    values = to_numpy(data, source)
    with np.errstate(over="ignore", invalid="ignore"):
        if target == "bfloat16":
            return _bfloat16(values.astype(np.float32, copy=False)).tobytes()
        return values.astype(np.dtype(target).newbyteorder("<")).tobytes()


def _bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    bits = values.view(np.uint32)
    # Half of the last place that stays, less one when that place is even (ties to even).
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    rounded[np.isnan(values)] = 0x7FC0
    return rounded
