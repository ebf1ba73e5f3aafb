"""Byte planes: the fast path, its plain twin and numpy agree on every size and alignment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotspeed import _native

ITEMS = st.sampled_from([1, 2, 4, 8, 16])
SKEWS = st.integers(0, 40)


def skewed(size: int, skew: int) -> np.ndarray:
    """A writable buffer of `size` bytes that begins `skew` bytes after an aligned address."""
    return np.full(size + skew, 0xA5, dtype=np.uint8)[skew:]


@given(
    item=ITEMS, count=st.integers(0, 600), source_skew=SKEWS, target_skew=SKEWS,
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_path_agrees_with_numpy(
    item: int, count: int, source_skew: int, target_skew: int, seed: int
) -> None:
    source = skewed(item * count, source_skew)
    source[:] = np.random.default_rng(seed).integers(0, 256, item * count, dtype=np.uint8)
    fast, plain = skewed(item * count, target_skew), skewed(item * count, 0)
    _native.split_planes(source, fast, item)
    _native.split_planes_scalar(source, plain, item)
    expected = source.reshape(count, item).T.reshape(-1)
    assert np.array_equal(fast, expected)
    assert np.array_equal(plain, expected)
    fast_back, plain_back = skewed(item * count, source_skew), skewed(item * count, 3)
    _native.join_planes(fast, fast_back, item)
    _native.join_planes_scalar(fast, plain_back, item)
    assert np.array_equal(fast_back, source)
    assert np.array_equal(plain_back, source)


def test_a_split_writes_nothing_beyond_its_target() -> None:
    around = np.full(4 * 65 + 64, 0xEE, dtype=np.uint8)
    source = np.zeros(4 * 65, dtype=np.uint8)
    _native.split_planes(source, around[32:-32], 4)
    assert (around[:32] == 0xEE).all()
    assert (around[-32:] == 0xEE).all()
    assert (around[32:-32] == 0).all()


@pytest.mark.parametrize("transform", [_native.split_planes, _native.join_planes])
@pytest.mark.parametrize(
    ("source", "target", "item"),
    [
        (bytes(8), bytearray(9), 4),
        (bytes(9), bytearray(9), 4),
        (bytes(8), bytearray(8), 3),
        (bytes(8), bytearray(8), 0),
        (bytes(8), bytes(8), 4),
    ],
    ids=["sizes differ", "no whole items", "unknown item", "no item", "read-only target"],
)
def test_what_does_not_fit_is_refused(transform, source, target, item) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        transform(source, target, item)


def test_a_strided_buffer_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        _native.split_planes(np.zeros(16, np.uint8)[::2], bytearray(8), 2)


def test_planes_in_place_are_refused() -> None:
    memory = memoryview(bytearray(12))
    with pytest.raises(ValueError, match="overlap"):
        _native.split_planes(memory[:8], memory[4:], 4)
