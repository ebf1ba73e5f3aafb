"""The extension codes and the limits of the plain-data format (docs/FORMAT.md, "Plain data")."""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Any


class Code(IntEnum):
    """MessagePack extension codes; a code's meaning never changes."""

    INTEGER = 1
    """Two's complement, little-endian; outside of -2**63 .. 2**64 - 1."""
    COMPLEX = 2
    """Real and imaginary part, each a little-endian binary64."""
    TUPLE = 3
    """An array of the items."""
    SET = 4
    """An array of the members, ordered by their encoded bytes."""
    FROZENSET = 5
    """As SET."""
    DICT = 6
    """An array key, value, key, value, ...; for a dict with a key that is not a str."""
    ORDERED_DICT = 7
    """As DICT."""
    COUNTER = 8
    """As DICT."""
    BYTEARRAY = 9
    """The bytes."""
    SURROGATE_TEXT = 10
    """A str with lone surrogates, in UTF-8 with "surrogatepass"."""
    SCALAR = 11
    """A numpy scalar: array of dtype.str and its bytes."""
    ARRAY = 12
    """A numpy array: array of dtype.str, shape, row-major bytes."""
    ARRAY_DATA = 13
    """A tensor: array of torch's dtype name, shape, row-major bytes."""
    TAGGED = 14
    """Array of a tag and a value; what the tag means is the writer's business."""


MAX_DEPTH = 100
"""Containers inside one another."""
MAX_BYTES = 256 * 1024 * 1024
"""Size of one encoded value."""
MAX_INTEGER_BYTES = 64 * 1024
"""Size of one integer; Python's own arithmetic on larger ones is not linear."""
MAX_EQUAL_HASHES = 1000
"""Keys of one dict or set with the same hash; more are an attack on the hash table."""
MAX_DIMENSIONS = 32
"""Dimensions of an array (numpy 1 has no more)."""

ARRAY_DTYPE = re.compile(r"[<>|][biufcSUVmM][0-9]{1,9}(\[[A-Za-z0-9]{1,16}\])?")
"""The numpy dtypes that have a fixed, plain form: no objects, no fields."""


def short(value: Any) -> str:
    """`value` for an error message: its repr, cut off, or its type when that has no short repr."""
    try:
        return repr(value)[:100]
    except (RecursionError, ValueError):
        return f"<{type(value).__name__}>"
