"""Stored bytes as numpy arrays; types that numpy lacks are widened to float32 exactly."""

from __future__ import annotations

from typing import Any

import numpy as np

_NUMPY = {
    "float64": "<f8", "float32": "<f4", "float16": "<f2",
    "int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "|i1",
    "uint64": "<u8", "uint32": "<u4", "uint16": "<u2", "uint8": "|u1", "bool": "|b1",
    "complex64": "<c8", "complex128": "<c16",
}  # fmt: skip


def to_numpy(data: bytes | bytearray | memoryview, dtype: str) -> np.ndarray[Any, Any]:
    """`data`, little-endian elements of `dtype`, as a flat array; a view where numpy has the type.

    bfloat16, float8_e4m3fn and float8_e5m2 become float32, which has every value of theirs
    (NaN payloads included for bfloat16). Raises KeyError for a type that is not the format's.
    """
    if dtype == "bfloat16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype in _FLOAT8:
        return _FLOAT8[dtype][np.frombuffer(data, np.uint8)]
    return np.frombuffer(data, _NUMPY[dtype])


def _float8_table(exponent_bits: int, *, has_infinity: bool) -> np.ndarray[Any, Any]:
    """The 256 values of an 8-bit float (OCP 8-bit Floating Point Specification 1.0, section 5)."""
    mantissa_bits = 7 - exponent_bits
    bias = (1 << (exponent_bits - 1)) - 1
    code = np.arange(256, dtype=np.int64)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits)
    normal = np.ldexp(1.0 + fraction, exponent - bias)
    value = np.where(exponent == 0, np.ldexp(fraction, 1 - bias), normal)
    top = exponent == (1 << exponent_bits) - 1
    if has_infinity:
        value = np.where(top, np.where(mantissa == 0, np.inf, np.nan), value)
    else:
        value = np.where(top & (mantissa == (1 << mantissa_bits) - 1), np.nan, value)
    return np.where(code >= 128, -value, value).astype(np.float32)


_FLOAT8 = {
    "float8_e4m3fn": _float8_table(4, has_infinity=False),
    "float8_e5m2": _float8_table(5, has_infinity=True),
}
