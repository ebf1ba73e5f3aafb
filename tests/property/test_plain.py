"""Whatever plain value goes in comes out; whatever bytes come in, only FormatError comes out."""

from __future__ import annotations

import struct

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from spotspeed.core.layout import ITEM_BYTES
from spotspeed.core.plain import ArrayData, Tagged, decode, encode
from spotspeed.errors import FormatError


@st.composite
def array_data(draw):
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    size_bytes = int(np.prod(shape, dtype=int)) * ITEM_BYTES[dtype]
    return ArrayData(dtype, shape, draw(st.binary(min_size=size_bytes, max_size=size_bytes)))


text = st.text(st.characters(exclude_categories=()))
hashable = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text | st.binary(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
arrays = np_st.arrays(
    np_st.scalar_dtypes(), np_st.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
)
leaves = st.one_of(
    hashable, st.complex_numbers(), st.floats(), array_data(), arrays,
    arrays.filter(lambda a: a.size > 0).map(lambda a: a.flat[0]),
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(text, inner, max_size=4), st.dictionaries(hashable, inner, max_size=4),
        st.sets(hashable, max_size=4), st.builds(Tagged, text, inner),
    ),
    max_leaves=12,
)  # fmt: skip


def same(left, right):
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack("<d", left) == struct.pack("<d", right)
    if isinstance(left, complex):
        return same(left.real, right.real) and same(left.imag, right.imag)
    if isinstance(left, np.ndarray | np.generic):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and (np.asarray(left).tobytes() == np.asarray(right).tobytes())
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    if isinstance(left, Tagged):
        return left.tag == right.tag and same(left.value, right.value)
    return bool(left == right)


@settings(max_examples=300, deadline=None)
@given(values)
def test_a_value_comes_back_the_same(value):
    data = encode(value, what="value")
    assert same(decode(data, source="test"), value)
    assert encode(value, what="value") == data


@settings(max_examples=300, deadline=None)
@given(values, st.data())
def test_damaged_bytes_decode_to_something_or_raise_format_error(value, choice):
    data = bytearray(encode(value, what="value"))
    for _ in range(choice.draw(st.integers(1, 3))):
        data[choice.draw(st.integers(0, len(data) - 1))] = choice.draw(st.integers(0, 255))
    cut = choice.draw(st.integers(0, len(data)))
    for damaged in (bytes(data), bytes(data[:cut])):
        try:
            decode(damaged, source="test")
        except FormatError:
            continue


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
@example(b"\xc9\x00\x00\x00\x00\x05")
@example(b"\xd4\x0b\x90")
def test_random_bytes_decode_to_something_or_raise_format_error(data):
    try:
        decode(data, source="test")
    except FormatError:
        return
