"""How the fields of the messages between ranks and saver are read back from what msgpack gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from spotspeed.core.documents import build, check_int, check_sha256
from spotspeed.core.frozen import ObjectRecord
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket

MAX_FRAGMENTS: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class NewObject:
    """A frozen object to be written: its content (core/frozen.py) and its number of fragments."""

    content: str
    fragment_count: int


def _check(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{str(value)[:40]!r} is not {' or '.join(k.__name__ for k in kinds)}")
    return value


def _int(value: Any) -> int:
    number: int = _check(value, int)
    if not 0 <= number <= 2**62:
        raise ValueError(f"{number} is out of range")
    return number


def _fragment(value: Any) -> Fragment:
    kind, name, scope, dtype, shape, start, stop = _check(value, list)
    key = TensorKey(_check(kind, str), _check(name, str), _check(scope, str))
    dimensions = tuple(_int(size) for size in _check(shape, list))
    return Fragment(key, _check(dtype, str), dimensions, Interval(_int(start), _int(stop)))


def _new_object(value: Any) -> NewObject:
    found: NewObject = build(NewObject, value, "saver socket: a new object")
    check_sha256("content", found.content)
    check_int("fragment_count", found.fragment_count, 1, MAX_FRAGMENTS)
    return found


def _tuple_of(parse: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    return lambda value: tuple(parse(item) for item in _check(value, list))


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{str(value)[:40]!r} is neither true nor false")
    return value


def _str(value: Any) -> str:
    text: str = _check(value, str)
    return text


PARSERS: dict[str, Callable[[Any], Any]] = {
    "int": _int,
    "float": lambda value: float(_check(value, int, float)),
    "bool": _bool,
    "str": _str,
    "bytes": lambda value: _check(value, bytes),
    "tuple[int, ...]": _tuple_of(_int),
    "tuple[str, ...]": _tuple_of(_str),
    "tuple[Fragment, ...]": _tuple_of(_fragment),
    "tuple[NewObject, ...]": _tuple_of(_new_object),
    "tuple[ObjectRecord, ...]": _tuple_of(
        lambda value: build(ObjectRecord, value, "saver socket: an object")
    ),
    "Ticket": lambda value: Ticket(**_check(value, dict)),
}
"""How a field of each annotation is read back."""
