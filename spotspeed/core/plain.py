"""Plain data to bytes and back, without pickle: what a checkpoint keeps beside its tensors.

The bytes are MessagePack. None, bool, 64-bit integers, float, str, bytes, list and dict with str
keys are MessagePack's own; every other supported type is an extension (docs/FORMAT.md, "Plain
data"), so that what comes back has the type and the value that went in: tuple, set, frozenset,
complex, large integers, bytearray, dict with other keys, OrderedDict, Counter, numpy scalars and
arrays, `ArrayData` and `Tagged`. Equal values give equal bytes: sets are ordered by their bytes.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from spotspeed.core.layout import ITEM_BYTES
from spotspeed.core.plain_codes import (
    ARRAY_DTYPE,
    MAX_BYTES,
    MAX_DEPTH,
    MAX_INTEGER_BYTES,
    Code,
    short,
)
from spotspeed.errors import CaptureError


@dataclass(frozen=True, slots=True)
class ArrayData:
    """A tensor as plain data: torch's name of the dtype, the shape, row-major bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of the format's")
        if any(size < 0 for size in self.shape):
            raise ValueError(f"shape {self.shape} has a negative size")
        expected = math.prod(self.shape) * ITEM_BYTES[self.dtype]
        if len(self.data) != expected:
            raise ValueError(
                f"{self.dtype}{list(self.shape)} has {expected} bytes, found {len(self.data)}"
            )


@dataclass(frozen=True, slots=True)
class Tagged:
    """A value of a type this module does not know, named by whoever converts it back."""

    tag: str
    value: Any


@dataclass(frozen=True, slots=True)
class Refused:
    """In place of a value that cannot be stored: `encode` says the reason and where it is."""

    reason: str


class _Unstorable(Exception):
    """Why a value cannot be stored; `keys` grows from the value outwards."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.keys: list[str] = []


def encode(value: Any, *, what: str) -> bytes:
    """The stored form of `value`; equal values of equal types give equal bytes.

    Raises CaptureError naming the key path of the first object that cannot be stored.
    """
    try:
        data = _Encoder().encode(value)
    except _Unstorable as error:
        path = what + "".join(reversed(error.keys))
        raise CaptureError(f"{path}: {error.reason}") from None
    except RecursionError:
        raise CaptureError(f"{what}: nested too deeply for this call stack") from None
    if len(data) > MAX_BYTES:
        raise CaptureError(f"{what}: {len(data)} bytes, at most {MAX_BYTES} are stored as plain "
                           f"data; of a client state, tensors and arrays of 1 MiB and more do not "
                           f"count: keep what is large in such")  # fmt: skip
    return data


def decode(data: bytes | memoryview, *, source: str) -> Any:
    """The value that `encode` stored; arrays are writable and own their memory.

    Time and memory are bounded by a small multiple of `len(data)`, whatever the bytes say.
    Raises FormatError naming `source`.
    """
    from spotspeed.core.plain_decode import decode_plain

    return decode_plain(data, source)


class _Encoder:
    """One walk over a value; holds the objects on the way down, to find cycles."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def encode(self, value: Any) -> bytes:
        packer = msgpack.Packer(autoreset=False, use_bin_type=True)
        self._put(packer, value)
        return bytes(packer.bytes())

    def _put(self, packer: msgpack.Packer, value: Any) -> None:
        kind = type(value)
        leaf = _LEAVES.get(kind)
        if leaf is not None:
            leaf(packer, value)
        elif kind in _CONTAINERS:
            self._put_container(packer, kind, value)
        elif isinstance(value, np.generic):
            _put_scalar(packer, value)
        else:
            raise _Unstorable(value.reason if kind is Refused else _refusal(value))

    def _put_container(self, packer: msgpack.Packer, kind: type, value: Any) -> None:
        if id(value) in self._open:
            raise _Unstorable("refers to itself")
        if len(self._open) >= MAX_DEPTH:
            raise _Unstorable(f"nested more than {MAX_DEPTH} deep")
        self._open.add(id(value))
        if kind is list:
            packer.pack_array_header(len(value))
            self._put_items(packer, value)
        elif kind is dict and all(type(key) is str and _is_unicode(key) for key in value):
            packer.pack_map_header(len(value))
            for key, item in value.items():
                packer.pack(key)
                self._put_keyed(packer, key, item)
        else:
            packer.pack_ext_type(_CONTAINERS[kind], self._payload(kind, value))
        self._open.remove(id(value))

    def _payload(self, kind: type, value: Any) -> bytes:
        if kind is Tagged:
            return self._tagged(value)
        if kind is set or kind is frozenset:
            members = sorted(self._member(item) for item in value)
            return _array_header(len(members)) + b"".join(members)
        packer = msgpack.Packer(autoreset=False, use_bin_type=True)
        if kind is tuple:
            packer.pack_array_header(len(value))
            self._put_items(packer, value)
        else:
            packer.pack_array_header(2 * len(value))
            for key, item in value.items():
                self._put_keyed(packer, key, key, "[key {}]")
                self._put_keyed(packer, key, item)
        return bytes(packer.bytes())

    def _put_items(self, packer: msgpack.Packer, items: Iterable[Any]) -> None:
        for index, item in enumerate(items):
            self._put_keyed(packer, index, item)

    def _put_keyed(self, packer: msgpack.Packer, key: Any, item: Any, form: str = "[{}]") -> None:
        try:
            self._put(packer, item)
        except _Unstorable as error:
            error.keys.append(form.format(short(key)))
            raise

    def _member(self, item: Any) -> bytes:
        try:
            return self.encode(item)
        except _Unstorable as error:
            error.keys.append("{...}")
            raise

    def _tagged(self, value: Tagged) -> bytes:
        packer = msgpack.Packer(autoreset=False, use_bin_type=True)
        packer.pack_array_header(2)
        self._put(packer, value.tag)
        self._put_keyed(packer, value.tag, value.value, ".<{}>")
        return bytes(packer.bytes())


def _array_header(count: int) -> bytes:
    packer = msgpack.Packer(autoreset=False)
    packer.pack_array_header(count)
    return bytes(packer.bytes())


_EXTENDED_BYTES = 10
_HAS_PADDING = np.finfo(np.longdouble).nmant == 63
"""Whether numpy's long double is x87's, of 80 bits."""


def _refusal(value: Any) -> str:
    kind = type(value)
    return (
        f"an object of type {kind.__module__}.{kind.__qualname__} cannot be stored without "
        f"running code at load: give numbers, strings, lists, dicts, arrays or tensors instead"
    )


def _is_unicode(text: str) -> bool:
    """Whether `text` has a UTF-8 form (no lone surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _put_native(packer: msgpack.Packer, value: Any) -> None:
    packer.pack(value)


def _put_int(packer: msgpack.Packer, value: int) -> None:
    if -(2**63) <= value < 2**64:
        packer.pack(value)
        return
    size_bytes = value.bit_length() // 8 + 1
    if size_bytes > MAX_INTEGER_BYTES:
        raise _Unstorable(f"an integer of {size_bytes} bytes, at most {MAX_INTEGER_BYTES}")
    packer.pack_ext_type(int(Code.INTEGER), value.to_bytes(size_bytes, "little", signed=True))


def _put_str(packer: msgpack.Packer, value: str) -> None:
    if _is_unicode(value):
        packer.pack(value)
    else:
        packer.pack_ext_type(int(Code.SURROGATE_TEXT), value.encode("utf-8", "surrogatepass"))


def _put_complex(packer: msgpack.Packer, value: complex) -> None:
    packer.pack_ext_type(int(Code.COMPLEX), np.array(value, "<c16").tobytes())


def _put_bytearray(packer: msgpack.Packer, value: bytearray) -> None:
    packer.pack_ext_type(int(Code.BYTEARRAY), bytes(value))


def _put_scalar(packer: msgpack.Packer, value: np.generic) -> None:
    dtype = _dtype_text(value.dtype)
    # numpy gives an empty string one element's room when it makes an array of it.
    data = _bytes_of(np.asarray(value))[: value.dtype.itemsize]
    payload = msgpack.packb([dtype, data], use_bin_type=True)
    packer.pack_ext_type(int(Code.SCALAR), payload)


def _put_array(packer: msgpack.Packer, value: np.ndarray[Any, Any]) -> None:
    dtype = _dtype_text(value.dtype)
    if value.dtype.itemsize == 0:
        raise _Unstorable(f"an array of dtype {dtype}, whose elements have no bytes")
    payload = msgpack.packb([dtype, list(value.shape), _bytes_of(value)], use_bin_type=True)
    packer.pack_ext_type(int(Code.ARRAY), payload)


def _bytes_of(array: np.ndarray[Any, Any]) -> bytes:
    """Its elements in row-major order, with zeros where an element has bytes of no meaning.

    Those of x87's extended precision are whatever was in memory, so that equal values would differ.
    """
    data = array.tobytes("C")
    if not (_HAS_PADDING and array.dtype.char in "gG"):
        return data
    elements = np.frombuffer(data, np.uint8).reshape(-1, np.dtype("g").itemsize).copy()
    elements[:, _EXTENDED_BYTES:] = 0
    return elements.tobytes()


def _put_array_data(packer: msgpack.Packer, value: ArrayData) -> None:
    payload = msgpack.packb([value.dtype, list(value.shape), value.data], use_bin_type=True)
    packer.pack_ext_type(int(Code.ARRAY_DATA), payload)


def _dtype_text(dtype: np.dtype[Any]) -> str:
    if dtype.fields is not None or not ARRAY_DTYPE.fullmatch(dtype.str):
        raise _Unstorable(f"numpy dtype {dtype} has no fixed, plain form")
    text: str = dtype.str
    return text


_LEAVES: dict[type, Callable[[msgpack.Packer, Any], None]] = {
    type(None): _put_native, bool: _put_native, float: _put_native, bytes: _put_native,
    int: _put_int, str: _put_str, complex: _put_complex, bytearray: _put_bytearray,
    np.ndarray: _put_array, ArrayData: _put_array_data,
}  # fmt: skip

_CONTAINERS: dict[type, int] = {
    list: 0, dict: Code.DICT, tuple: Code.TUPLE, set: Code.SET, frozenset: Code.FROZENSET,
    OrderedDict: Code.ORDERED_DICT, Counter: Code.COUNTER, Tagged: Code.TAGGED,
}  # fmt: skip
