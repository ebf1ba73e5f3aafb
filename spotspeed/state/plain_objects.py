"""Objects of the standard library as plain data, and back: a closed list, and no code of theirs.

What comes back has the type that went in, but for what only code could make again: of an enum's
member its value is kept, of a named tuple and of subclasses of built-in types the built-in value.
"""

from __future__ import annotations

import argparse
import datetime
import decimal
import fractions
import pathlib
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import torch

from spotspeed.core.plain import ArrayData, Refused, Tagged
from spotspeed.errors import FormatError

_AS_THEY_ARE = frozenset({
    type(None), bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset,
    OrderedDict, Counter, ArrayData, Tagged, Refused,
})  # fmt: skip
_BASES = (OrderedDict, Counter, dict, tuple, list, set, frozenset, str, bytes, bytearray, int,
          float, complex)  # fmt: skip
"""What a subclass is stored as: the first of them that it is one of."""
_FACTORIES: dict[str, Any] = {
    "None": None, "list": list, "dict": dict, "set": set, "int": int, "float": float, "str": str,
    "tuple": tuple, "bool": bool, "OrderedDict": OrderedDict, "Counter": Counter, "deque": deque,
}  # fmt: skip


def take_apart(value: Any) -> Any:
    """An object of the list as a `Tagged` of built-in values, a subclass as its built-in value.

    Everything else as it is.
    """
    kind = type(value)
    if kind in _AS_THEY_ARE or isinstance(value, torch.Tensor | torch.Size | np.generic):
        return value
    if isinstance(value, Enum):
        return take_apart(value.value)
    if isinstance(value, defaultdict):
        return _default_dict(value)
    for found, (tag, parts, _) in _OBJECTS.items():
        if isinstance(value, found):
            return Tagged(tag, parts(value))
    if isinstance(value, types.MappingProxyType):
        return dict(value)
    base = next((base for base in _BASES if isinstance(value, base)), None)
    return value if base is None else _plainly(base, value)


def put_together(tag: str, parts: Any) -> Any:
    """The inverse of `take_apart`, for a tag of `OBJECT_TAGS`; FormatError for other parts."""
    try:
        return _BUILDERS[tag](parts)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise FormatError(f"plain data: {tag}: {error!r}") from None


def _plainly(base: Any, value: Any) -> Any:
    """The built-in value of a subclass's instance, by the methods of the built-in type alone."""
    if issubclass(base, dict):
        return base(dict.items(value)) if base is not Counter else Counter(dict(dict.items(value)))
    if base in (int, float, complex, str, bytes):
        read: Any = {int: int.__int__, float: float.__float__, complex: complex.__complex__,
                     str: str.__str__, bytes: bytes.__bytes__}[base]  # fmt: skip
        return read(value)
    return base(base.__iter__(value))


def _default_dict(value: defaultdict[Any, Any]) -> Any:
    names = [name for name, kind in _FACTORIES.items() if value.default_factory is kind]
    items = dict(dict.items(value))
    return Tagged("collections.defaultdict", (names[0], items)) if names else items


def _path(value: pathlib.PurePath) -> tuple[str, str]:
    is_windows = isinstance(value, pathlib.PureWindowsPath)
    kind = "path" if isinstance(value, pathlib.Path) else "windows" if is_windows else "posix"
    return kind, str(value)


_PATHS: dict[str, Any] = {
    "path": pathlib.Path, "windows": pathlib.PureWindowsPath, "posix": pathlib.PurePosixPath,
}  # fmt: skip

_OBJECTS: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    argparse.Namespace: (
        "argparse.Namespace", lambda value: dict(vars(value)),
        lambda parts: argparse.Namespace(**parts),
    ),
    types.SimpleNamespace: (
        "types.SimpleNamespace", lambda value: dict(vars(value)),
        lambda parts: types.SimpleNamespace(**parts),
    ),
    defaultdict: (
        "collections.defaultdict", _default_dict,
        lambda parts: defaultdict(_FACTORIES[parts[0]], parts[1]),
    ),
    deque: (
        "collections.deque", lambda value: (list(value), value.maxlen),
        lambda parts: deque(parts[0], parts[1]),
    ),
    range: (
        "range", lambda value: (value.start, value.stop, value.step), lambda parts: range(*parts),
    ),
    slice: (
        "slice", lambda value: (value.start, value.stop, value.step), lambda parts: slice(*parts),
    ),
    pathlib.PurePath: ("pathlib", _path, lambda parts: _PATHS[parts[0]](parts[1])),
    datetime.datetime: (
        "datetime.datetime", datetime.datetime.isoformat, datetime.datetime.fromisoformat,
    ),
    datetime.date: ("datetime.date", datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.time: ("datetime.time", datetime.time.isoformat, datetime.time.fromisoformat),
    datetime.timedelta: (
        "datetime.timedelta", lambda value: (value.days, value.seconds, value.microseconds),
        lambda parts: datetime.timedelta(*parts),
    ),
    decimal.Decimal: ("decimal.Decimal", decimal.Decimal.__str__, decimal.Decimal),
    fractions.Fraction: (
        "fractions.Fraction", lambda value: (value.numerator, value.denominator),
        lambda parts: fractions.Fraction(*parts),
    ),
    uuid.UUID: ("uuid.UUID", lambda value: value.hex, uuid.UUID),
}  # fmt: skip
_BUILDERS = {tag: build for tag, _, build in _OBJECTS.values()}
OBJECT_TAGS = frozenset(_BUILDERS)
"""The tags that `put_together` knows."""
