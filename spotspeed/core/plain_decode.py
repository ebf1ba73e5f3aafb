"""Strict, bounded decoding of the plain-data format; core/plain.py has the contract."""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from spotspeed.core.plain import ArrayData, Tagged
from spotspeed.core.plain_codes import (
    ARRAY_DTYPE,
    MAX_BYTES,
    MAX_DEPTH,
    MAX_DIMENSIONS,
    MAX_EQUAL_HASHES,
    MAX_INTEGER_BYTES,
    Code,
    short,
)
from spotspeed.errors import FormatError


class _Malformed(Exception):
    """What is wrong, without the name of the source."""


def decode_plain(data: bytes | memoryview, source: str) -> Any:
    """The decoded value; raises FormatError and nothing else for any bytes."""
    if len(data) > MAX_BYTES:
        raise FormatError(f"{source}: {len(data)} bytes, at most {MAX_BYTES} are read")
    try:
        reader = _Reader(memoryview(data).cast("B"), MAX_DEPTH)
        value = reader.value()
        reader.expect_end()
    except _Malformed as error:
        raise FormatError(f"{source}: not plain data: {error}") from None
    except RecursionError:
        raise FormatError(f"{source}: nested too deeply for this call stack") from None
    return value


class _Reader:
    """Reads MessagePack values from a view; `depth` is how many containers may still open."""

    __slots__ = ("_depth", "_offset", "_view")

    def __init__(self, view: memoryview, depth: int) -> None:
        self._view = view
        self._depth = depth
        self._offset = 0

    def expect_end(self) -> None:
        if self._offset != len(self._view):
            raise _Malformed(f"{len(self._view) - self._offset} bytes after the end")

    def value(self) -> Any:
        first = self._take(1)[0]
        if first <= 0x7F:
            return first
        if first >= 0xE0:
            return first - 0x100
        if first <= 0x8F:
            return self._map(first & 0x0F)
        if first <= 0x9F:
            return self.items(first & 0x0F)
        if first <= 0xBF:
            return self._text(first & 0x1F)
        read = _READERS.get(first)
        if read is None:
            raise _Malformed(f"byte 0x{first:02x} begins no value")
        return read(self)

    def number(self, form: struct.Struct) -> Any:
        return form.unpack(self._take(form.size))[0]

    def items(self, count: int) -> list[Any]:
        """The next `count` values; each takes a byte at least, which bounds what is claimed."""
        self._open(count)
        found = [self.value() for _ in range(count)]
        self._depth += 1
        return found

    def array(self) -> list[Any]:
        """The payload of an extension that is one array."""
        value = self.value()
        self.expect_end()
        if type(value) is not list:
            raise _Malformed("an extension that should hold an array does not")
        return value

    def _open(self, count: int) -> None:
        if count > len(self._view) - self._offset:
            raise _Malformed(f"{count} items are claimed where {len(self._view)} bytes are left")
        if self._depth <= 0:
            raise _Malformed(f"nested more than {MAX_DEPTH} deep")
        self._depth -= 1

    def _map(self, count: int) -> dict[str, Any]:
        self._open(count)
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.value()
            if type(key) is not str or key in found:
                raise _Malformed(f"a map with the key {short(key)}, twice or not a string")
            found[key] = self.value()
        self._depth += 1
        return found

    def _text(self, size_bytes: int, errors: str = "strict") -> str:
        return _text(self._take(size_bytes), errors)

    def _extension(self, size_bytes: int) -> Any:
        number = self._take(1)[0]
        payload = self._take(size_bytes)
        build = _EXTENSIONS.get(number)
        if build is None:
            raise _Malformed(f"unknown extension {number}")
        if self._depth <= 0:
            raise _Malformed(f"nested more than {MAX_DEPTH} deep")
        # The payload's own array is the extension's container: together they are one level.
        return build(payload, self._depth)

    def _take(self, size_bytes: int) -> memoryview:
        start = self._offset
        if size_bytes > len(self._view) - start:
            raise _Malformed(f"cut off: {size_bytes} bytes wanted at offset {start}")
        self._offset = start + size_bytes
        return self._view[start : self._offset]


def _sized(form: str, read: Callable[[_Reader, int], Any]) -> Callable[[_Reader], Any]:
    size = struct.Struct(form)
    return lambda reader: read(reader, reader.number(size))


def _plain_number(form: str) -> Callable[[_Reader], Any]:
    number = struct.Struct(form)
    return lambda reader: reader.number(number)


def _read_bytes(reader: _Reader, size_bytes: int) -> bytes:
    return bytes(reader._take(size_bytes))


def _fixed_extension(size_bytes: int) -> Callable[[_Reader], Any]:
    return lambda reader: reader._extension(size_bytes)


_READERS: dict[int, Callable[[_Reader], Any]] = {
    0xC0: lambda _: None, 0xC2: lambda _: False, 0xC3: lambda _: True,
    0xC4: _sized(">B", _read_bytes), 0xC5: _sized(">H", _read_bytes),
    0xC6: _sized(">I", _read_bytes),
    0xC7: _sized(">B", _Reader._extension), 0xC8: _sized(">H", _Reader._extension),
    0xC9: _sized(">I", _Reader._extension),
    0xCA: _plain_number(">f"), 0xCB: _plain_number(">d"),
    0xCC: _plain_number(">B"), 0xCD: _plain_number(">H"),
    0xCE: _plain_number(">I"), 0xCF: _plain_number(">Q"),
    0xD0: _plain_number(">b"), 0xD1: _plain_number(">h"),
    0xD2: _plain_number(">i"), 0xD3: _plain_number(">q"),
    0xD4: _fixed_extension(1), 0xD5: _fixed_extension(2), 0xD6: _fixed_extension(4),
    0xD7: _fixed_extension(8), 0xD8: _fixed_extension(16),
    0xD9: _sized(">B", _Reader._text), 0xDA: _sized(">H", _Reader._text),
    0xDB: _sized(">I", _Reader._text),
    0xDC: _sized(">H", _Reader.items), 0xDD: _sized(">I", _Reader.items),
    0xDE: _sized(">H", _Reader._map), 0xDF: _sized(">I", _Reader._map),
}  # fmt: skip


def _text(data: memoryview, errors: str) -> str:
    try:
        return str(data, "utf-8", errors)
    except UnicodeDecodeError:
        raise _Malformed("a string that is not UTF-8") from None


def _integer(payload: memoryview, depth: int) -> int:
    if not 0 < len(payload) <= MAX_INTEGER_BYTES:
        raise _Malformed(f"an integer of {len(payload)} bytes")
    return int.from_bytes(payload, "little", signed=True)


def _complex(payload: memoryview, depth: int) -> complex:
    if len(payload) != 16:
        raise _Malformed(f"a complex number of {len(payload)} bytes")
    return complex(*struct.unpack("<dd", payload))


def _tuple(payload: memoryview, depth: int) -> tuple[Any, ...]:
    return tuple(_Reader(payload, depth).array())


def _pairs(payload: memoryview, depth: int) -> list[tuple[Any, Any]]:
    flat = _Reader(payload, depth).array()
    if len(flat) % 2:
        raise _Malformed("a key without a value")
    _check_hashes(flat[::2])
    return list(zip(flat[::2], flat[1::2], strict=True))


def _mapping(kind: Callable[[Any], Any]) -> Callable[[memoryview, int], Any]:
    def build(payload: memoryview, depth: int) -> Any:
        pairs = _pairs(payload, depth)
        found = kind(dict(pairs))
        if len(found) != len(pairs):
            raise _Malformed("a dict with the same key twice")
        return found

    return build


def _members(kind: Callable[[list[Any]], Any]) -> Callable[[memoryview, int], Any]:
    def build(payload: memoryview, depth: int) -> Any:
        members = _Reader(payload, depth).array()
        _check_hashes(members)
        found = kind(members)
        if len(found) != len(members):
            raise _Malformed("a set with the same member twice")
        return found

    return build


def _check_hashes(keys: list[Any]) -> None:
    """Refuse unhashable keys, and enough equal hashes to make a hash table quadratic."""
    try:
        hashes = [hash(key) for key in keys]
    except (TypeError, ValueError):
        raise _Malformed("a key or a member of a type that cannot be one") from None
    if len(keys) > MAX_EQUAL_HASHES and max(Counter(hashes).values()) > MAX_EQUAL_HASHES:
        raise _Malformed(f"more than {MAX_EQUAL_HASHES} keys with one hash")


def _bytearray(payload: memoryview, depth: int) -> bytearray:
    return bytearray(payload)


def _surrogate_text(payload: memoryview, depth: int) -> str:
    return _text(payload, "surrogatepass")


def _scalar(payload: memoryview, depth: int) -> np.generic:
    fields = _Reader(payload, depth).array()
    if len(fields) != 2:
        raise _Malformed("a numpy scalar needs dtype and bytes")
    dtype, data = _dtype(fields[0]), fields[1]
    if type(data) is not bytes or len(data) != dtype.itemsize:
        raise _Malformed(f"a numpy scalar of {dtype} needs {dtype.itemsize} bytes")
    if dtype.itemsize == 0:
        empty: np.generic = dtype.type()
        return empty
    scalar: np.generic = np.frombuffer(data, dtype, 1)[0]
    return scalar


def _array(payload: memoryview, depth: int) -> np.ndarray[Any, Any]:
    name, shape, data = _array_fields(payload, depth)
    dtype = _dtype(name)
    if dtype.itemsize == 0:
        raise _Malformed(f"an array of {dtype}, whose elements have no bytes")
    try:
        found: np.ndarray[Any, Any] = np.ndarray(shape, dtype, buffer=bytearray(data))
    except (TypeError, ValueError) as error:
        raise _Malformed(f"an array of {dtype} and {shape}: {error}") from None
    if found.nbytes != len(data):
        raise _Malformed(f"an array of {dtype} and {shape} with {len(data)} bytes")
    return found


def _array_data(payload: memoryview, depth: int) -> ArrayData:
    name, shape, data = _array_fields(payload, depth)
    try:
        return ArrayData(name, shape, data)
    except ValueError as error:
        raise _Malformed(str(error)) from None


def _array_fields(payload: memoryview, depth: int) -> tuple[str, tuple[int, ...], bytes]:
    fields = _Reader(payload, depth).array()
    if [type(field) for field in fields] != [str, list, bytes]:
        raise _Malformed("an array needs dtype, shape and bytes")
    name, shape, data = fields
    if len(shape) > MAX_DIMENSIONS or any(
        type(size) is not int or not 0 <= size < 2**63 for size in shape
    ):
        raise _Malformed(f"{short(shape)} is not a shape")
    return name, tuple(shape), data


def _dtype(name: object) -> np.dtype[Any]:
    if type(name) is not str or not ARRAY_DTYPE.fullmatch(name):
        raise _Malformed(f"{short(name)} is not a dtype of the format")
    try:
        return np.dtype(name)
    except (TypeError, ValueError):
        raise _Malformed(f"numpy here has no dtype {name!r}") from None


def _tagged(payload: memoryview, depth: int) -> Tagged:
    fields = _Reader(payload, depth).array()
    if len(fields) != 2 or type(fields[0]) is not str:
        raise _Malformed("a tagged value needs a tag and a value")
    return Tagged(fields[0], fields[1])


_EXTENSIONS: dict[int, Callable[[memoryview, int], Any]] = {
    Code.INTEGER: _integer, Code.COMPLEX: _complex, Code.TUPLE: _tuple,
    Code.SET: _members(set), Code.FROZENSET: _members(frozenset),
    Code.DICT: _mapping(dict), Code.ORDERED_DICT: _mapping(OrderedDict),
    Code.COUNTER: _mapping(Counter), Code.BYTEARRAY: _bytearray,
    Code.SURROGATE_TEXT: _surrogate_text, Code.SCALAR: _scalar, Code.ARRAY: _array,
    Code.ARRAY_DATA: _array_data, Code.TAGGED: _tagged,
}  # fmt: skip
