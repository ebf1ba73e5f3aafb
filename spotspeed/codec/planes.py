"""Byte planes: byte 0 of every number, then byte 1 of every number, and so on.

The exponent bytes of trained weights and optimizer state have few distinct values, the low bytes of
the mantissa are noise; apart from each other the former compress and the latter need no attempt.
"""

from __future__ import annotations

import importlib
from typing import Any

from spotspeed.codec.digest import Buffer


def _find_native() -> Any:
    try:
        native = importlib.import_module("spotspeed._native")
    except ImportError:
        return None
    return native if hasattr(native, "split_planes") else None


_native = _find_native()


def split_planes(chunk: Buffer, item_bytes: int, out: bytearray | memoryview) -> None:
    """Write the planes of `chunk` one after another to `out`, which has the same size.

    `len(chunk)` is `item_bytes` times n numbers; plane `p` is `out[p * n:(p + 1) * n]`.
    """
    _check(len(chunk), item_bytes, len(out))
    if _native is not None:
        _native.split_planes(chunk, out, item_bytes)
        return
    count = len(chunk) // item_bytes
    numbers, planes = memoryview(chunk).cast("B"), memoryview(out).cast("B")
    for number in range(item_bytes):
        planes[number * count : (number + 1) * count] = numbers[number::item_bytes]


def join_planes(planes: Buffer, item_bytes: int, out: bytearray | memoryview) -> None:
    """The inverse of `split_planes`: write the numbers whose planes are given to `out`."""
    _check(len(planes), item_bytes, len(out))
    if _native is not None:
        _native.join_planes(planes, out, item_bytes)
        return
    count = len(planes) // item_bytes
    source, numbers = memoryview(planes).cast("B"), memoryview(out).cast("B")
    for number in range(item_bytes):
        numbers[number::item_bytes] = source[number * count : (number + 1) * count]


def _check(size: int, item_bytes: int, out_size: int) -> None:
    if item_bytes < 1 or size % item_bytes or out_size != size:
        raise ValueError(f"{size} bytes of {item_bytes}-byte numbers into {out_size} bytes")
