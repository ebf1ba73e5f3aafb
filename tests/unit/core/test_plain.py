"""Plain data comes back with the value and the type that went in, and hostile bytes are refused."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections import Counter, OrderedDict, defaultdict, namedtuple

import msgpack
import numpy as np
import pytest

from spotspeed.core.plain import ArrayData, Tagged, decode, encode
from spotspeed.core.plain_codes import MAX_DEPTH, MAX_EQUAL_HASHES, Code
from spotspeed.errors import CaptureError, FormatError


def round_trip(value):
    return decode(encode(value, what="value"), source="test")


def extension(code, value):
    return msgpack.packb(msgpack.ExtType(int(code), msgpack.packb(value)))


def spelling(value):
    """The value's repr; equal sets may list their members in any order."""
    is_set = isinstance(value, set | frozenset)
    return sorted(map(repr, value)) if is_set else repr(value)


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -1, 2**63, -(2**63), 2**64 - 1, 2**64, -(2**63) - 1, 3**900,
        0.0, 1.5, float("inf"), "", "Zürich", "a\ud800b", b"", b"\x00\xff", bytearray(b"ab"),
        1 - 2j, complex(-0.0, float("inf")),
        [], [1, [2, []]], (), (1, (2,), [3]), {1, "a", (2, 3)}, frozenset({frozenset(), b"x"}),
        {}, {"a": 1, "b": {"c": (1,)}}, {1: "a", "1": "b", (1, 2): None, None: 0, 2.5: [],
                                         frozenset({1}): 1, b"k": 2, "\udcff": 3},
        OrderedDict([("b", 1), ("a", 2)]), OrderedDict([(2, 1), (1, 2)]), Counter({30: 1, 60: 2}),
        Tagged("torch.Size", (2, 3)), ArrayData("bfloat16", (2, 1), b"\x01\x02\x03\x04"),
        ArrayData("float32", (), b"\x00\x00\x80\x7f"), ArrayData("int8", (0, 5), b""),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_every_supported_value_comes_back_with_its_type(value):
    found = round_trip(value)
    assert found == value
    assert type(found) is type(value)
    assert spelling(found) == spelling(value)


def test_integers_too_long_to_print_come_back():
    assert round_trip([3**20000, -(3**20000)]) == [3**20000, -(3**20000)]


def test_the_types_of_inner_values_are_kept():
    found = round_trip({"a": [(1, 2), [1, 2], {3}], "b": OrderedDict(x=(True, 1, 1.0))})
    assert [type(item) for item in found["a"]] == [tuple, list, set]
    assert type(found["b"]) is OrderedDict
    assert [type(item) for item in found["b"]["x"]] == [bool, int, float]


def test_the_order_of_a_dict_is_kept():
    assert list(round_trip({"z": 1, "a": 2, "m": 3})) == ["z", "a", "m"]
    assert list(round_trip(OrderedDict([(3, 1), (1, 2)]))) == [3, 1]


@pytest.mark.parametrize("bits", [0x7FF8000000000123, 0xFFF8000000000000, 0x8000000000000000])
def test_the_bits_of_a_float_are_kept(bits):
    (value,) = struct.unpack("<d", struct.pack("<Q", bits))
    assert struct.pack("<d", round_trip(value)) == struct.pack("<Q", bits)
    found = round_trip(complex(value, 0.0))
    assert struct.pack("<d", found.real) == struct.pack("<Q", bits)


def test_negative_zero_keeps_its_sign():
    assert math.copysign(1, round_trip(-0.0)) == -1


DTYPES = ["?", "b", "B", "h", "H", "i", "I", "l", "L", "e", "f", "d", "g", "F", "D", "G",
          "M8[ns]", "m8[25us]", "M8", "S3", "U5", "V7", ">i4", ">f8", ">U2", ">M8[D]"]  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
def test_arrays_and_scalars_of_every_plain_dtype_come_back_bit_for_bit(name):
    dtype = np.dtype(name)
    bits = np.random.default_rng(0).integers(0, 2, 6 * dtype.itemsize, dtype=np.uint8)
    array = bits.view(dtype).reshape(2, 3)
    found = round_trip(array)
    assert (type(found), found.dtype, found.shape) == (np.ndarray, dtype, (2, 3))
    assert bits_of(found) == bits_of(array)
    assert found.flags.writeable and found.flags.aligned
    scalar = round_trip(array[1, 2])
    assert type(scalar) is type(array[1, 2])
    assert bits_of(np.asarray(scalar)) == bits_of(np.asarray(array[1, 2]))


def bits_of(array):
    """Its bytes without the padding of x87's long doubles, which numpy does not preserve."""
    data = array.tobytes()
    if array.dtype.char not in "gG" or np.finfo("g").nmant != 63:
        return data
    return b"".join(data[at : at + 10] for at in range(0, len(data), 16))


@pytest.mark.parametrize("name", ["g", "G"])
def test_equal_long_doubles_have_equal_bytes_whatever_is_in_their_padding(name):
    stored = []
    for garbage in (0, 0xAB):
        raw = np.full((4, 16), garbage, np.uint8)
        raw[:, :10] = np.full(4, 1.5, "g").view(np.uint8).reshape(4, 16)[:, :10]
        array = raw.reshape(-1).view(name)
        assert array[0] in (1.5, 1.5 + 1.5j)
        stored.append((encode(array, what="value"), encode(array[0], what="value")))
    assert stored[0] == stored[1]


def test_arrays_of_any_layout_come_back_in_row_major_order():
    array = np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)[::-2]
    assert np.array_equal(round_trip(array), array)
    assert round_trip(np.array(3.5)).shape == ()
    assert round_trip(np.zeros((3, 0, 2), "f4")).shape == (3, 0, 2)
    assert round_trip(np.str_("")) == "" and type(round_trip(np.str_(""))) is np.str_


def test_a_decoded_array_does_not_share_memory_with_the_bytes():
    data = bytearray(encode(np.arange(4), what="value"))
    found = decode(memoryview(data), source="test")
    data[:] = bytes(len(data))
    assert found.tolist() == [0, 1, 2, 3]


def test_the_state_of_the_random_generators_round_trips():
    import random

    generator = random.Random(3)
    generator.gauss(0, 1)
    again = random.Random()
    again.setstate(round_trip(generator.getstate()))
    assert [again.random() for _ in range(5)] == [generator.random() for _ in range(5)]
    state = np.random.RandomState(5).get_state(legacy=False)
    other = np.random.RandomState()
    other.set_state(round_trip(state))
    assert other.randn() == np.random.RandomState(5).randn()


def test_equal_sets_have_equal_bytes_whatever_their_history():
    grown = set(range(1000))
    grown -= set(range(8, 1000))
    assert encode(grown, what="a") == encode(set(range(7, -1, -1)), what="b")


class Opaque:
    pass


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, {"b": Opaque()}]}, "state['a'][1]['b']: an object of type"),
        ({"a": {(1, 2): Opaque()}}, "state['a'][(1, 2)]: "),
        ({Point(1, 2): 0}, "state[key Point(x=1, y=2)]: "),
        ([lambda: 0], "state[0]: an object of type builtins.function"),
        ((1, print), "state[1]: "),
        ({Point(1, 2)}, "state{...}: "),
        (Tagged("outer", [Opaque()]), "state.<'outer'>[0]: "),
        ([np.array([None, 1])], "state[0]: numpy dtype object"),
        (np.zeros(2, [("a", "i4")]), "state: numpy dtype"),
        (np.zeros(2, "V0"), "state: an array of dtype"),
        (np.ma.array([1, 2]), "state: an object of type"),
        (defaultdict(int), "state: an object of type collections.defaultdict"),
        (memoryview(b"a"), "state: an object of type builtins.memoryview"),
        ([1 << 10**6], "state[0]: an integer of"),
        ({1 << 20000: Opaque()}, "state[<int>]: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_stored_is_named_by_its_key_path(value, path):
    with pytest.raises(CaptureError) as caught:
        encode(value, what="state")
    assert str(caught.value).startswith(path)


def test_a_cycle_is_refused_and_a_shared_object_is_not():
    cycle = {"a": []}
    cycle["a"].append(cycle)
    with pytest.raises(CaptureError, match=r"state\['a'\]\[0\]: refers to itself"):
        encode(cycle, what="state")
    shared = [1]
    assert round_trip([shared, (shared, shared)]) == [[1], ([1], [1])]


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: (v,), lambda v: {"a": v},
                                  lambda v: {1: v}, lambda v: Tagged("t", v),
                                  lambda v: frozenset([v])])  # fmt: skip
def test_depth_is_limited_on_both_sides_alike(wrap):
    value = None
    for _ in range(MAX_DEPTH):
        value = wrap(value)
    assert round_trip(value) == value
    with pytest.raises(CaptureError, match="nested more than"):
        encode(wrap(value), what="state")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cut off"),
        (b"\xc1", "begins no value"),
        (b"\x01\x02", "1 bytes after the end"),
        (b"\xdd\xff\xff\xff\xff", "4294967295 items are claimed"),
        (b"\xdf\x7f\xff\xff\xff\xa1a\x01", "items are claimed"),
        (b"\xc6\xff\xff\xff\xffab", "cut off"),
        (b"\x82\xa1a\x01\xa1a\x02", "twice or not a string"),
        (b"\x81\x01\x02", "twice or not a string"),
        (b"\xa2\xff\xfe", "not UTF-8"),
        (b"\x91" * 500 + b"\xc0", "nested more than"),
        (msgpack.packb(msgpack.ExtType(99, b"")), "unknown extension 99"),
        (msgpack.packb(msgpack.ExtType(int(Code.INTEGER), b"")), "an integer of 0 bytes"),
        (msgpack.packb(msgpack.ExtType(int(Code.COMPLEX), b"12")), "a complex number of 2"),
        (msgpack.packb(msgpack.ExtType(int(Code.TUPLE), b"\x90\x01")), "after the end"),
        (extension(Code.TUPLE, 5), "should hold an array"),
        (extension(Code.DICT, [1]), "a key without a value"),
        (extension(Code.DICT, [1, 2, 1, 3]), "same key twice"),
        (extension(Code.DICT, [[1], 2]), "a type that cannot be one"),
        (extension(Code.SET, [1, 1]), "same member twice"),
        (extension(Code.SET, [{}]), "a type that cannot be one"),
        (extension(Code.SCALAR, ["|O", b"12345678"]), "not a dtype of the format"),
        (extension(Code.SCALAR, ["<f8", b"1"]), "needs 8 bytes"),
        (extension(Code.SCALAR, ["<f7", b"1234567"]), "no dtype"),
        (extension(Code.ARRAY, ["<f8", [2], b"12345678"]), "an array of"),
        (extension(Code.ARRAY, ["<f8", [2**62, 2**62], b""]), "an array of"),
        (extension(Code.ARRAY, ["<f8", [0, 2**62], b""]), "too big"),
        (extension(Code.ARRAY, ["<f8", [-1], b""]), "not a shape"),
        (extension(Code.ARRAY, ["<f8", [True], b"12345678"]), "not a shape"),
        (extension(Code.ARRAY, ["<f8", [1] * 40, b"12345678"]), "not a shape"),
        (extension(Code.ARRAY, ["<U0", [2**40], b""]), "have no bytes"),
        (extension(Code.ARRAY, ["<U999999999", [1], b""]), "no dtype"),
        (extension(Code.ARRAY, ["<M8[qq]", [0], b""]), "no dtype"),
        (extension(Code.ARRAY_DATA, ["float99", [1], b"1"]), "not one of the format's"),
        (extension(Code.ARRAY_DATA, ["float32", [2**40], b"1"]), "has 4398046511104 bytes"),
        (extension(Code.TAGGED, [1, 2]), "needs a tag and a value"),
    ],
)
def test_hostile_bytes_raise_format_errors_that_name_the_source(data, why):
    with pytest.raises(FormatError) as caught:
        decode(data, source="x.shard: job")
    assert str(caught.value).startswith("x.shard: job: ")
    assert why in str(caught.value)


def test_claims_of_size_cost_no_memory():
    bomb = b"\xdd\x00\x0f\xff\xff" * 90 + bytes(1 << 16)
    tracemalloc.start()
    with pytest.raises(FormatError):
        decode(bomb, source="bomb")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_colliding_keys_are_refused():
    prime = 2**61 - 1
    keys = [index * prime for index in range(1, 2 * MAX_EQUAL_HASHES)]
    data = encode(keys, what="keys")
    as_set = msgpack.packb(msgpack.ExtType(int(Code.SET), data))
    with pytest.raises(FormatError, match="keys with one hash"):
        decode(as_set, source="bomb")


def test_the_bytes_are_message_pack():
    data = encode({"a": [1, 2.5, "x", b"y", None, True]}, what="value")
    assert msgpack.unpackb(data) == {"a": [1, 2.5, "x", b"y", None, True]}
