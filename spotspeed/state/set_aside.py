"""Large tensors and arrays in a caller's data, taken out of it to be stored as tensors.

What stays in their place is a tagged value with the name under which each is stored, of kind
"client" (docs/FORMAT.md, "Plain data"). Plain data itself is read whole, and has a limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from spotspeed.core.interval import Interval
from spotspeed.core.layout import ITEM_BYTES, KIND_CLIENT, Fragment, TensorKey
from spotspeed.core.plain import Tagged
from spotspeed.errors import FormatError
from spotspeed.state.plain_tensors import PARAMETER, is_storable, replace_leaves

LARGE_BYTES = 1 << 20
"""What is smaller stays where it is."""
STORED = "stored"

Piece = tuple[Fragment, torch.Tensor]


def set_aside(value: Any) -> tuple[Any, tuple[Piece, ...]]:
    """`value` without its large tensors and arrays, and these, copied to host memory and flat.

    Everything else of `value` is shared. One that is there several times is stored once.
    """
    pieces: list[Piece] = []
    known: dict[int, Any] = {}

    def take(item: Any) -> Any:
        if not _is_large(item):
            return item
        if id(item) not in known:
            known[id(item)] = _taken(item, pieces)
        return known[id(item)]

    return replace_leaves(value, take, is_plain=False), tuple(pieces)


def put_back(value: Any, read: Callable[[TensorKey], torch.Tensor]) -> Any:
    """The inverse of `set_aside`; `read` gives each stored tensor in its shape.

    Raises FormatError where the place of one does not say which it is.
    """

    def give(item: Any) -> Any:
        if not isinstance(item, Tagged):
            return item
        if item.tag == PARAMETER and isinstance(item.value, tuple):
            return Tagged(PARAMETER, tuple(give(part) for part in item.value))
        if item.tag != STORED:
            return item
        if not isinstance(item.value, tuple) or [type(part) for part in item.value] != [str, bool]:
            raise FormatError(f"plain data: {item.value!r:.80} does not name a stored tensor")
        name, is_array = item.value
        tensor = read(TensorKey(KIND_CLIENT, name))
        return tensor.numpy() if is_array else tensor

    return replace_leaves(value, give, is_plain=True)


def _is_large(item: Any) -> bool:
    if isinstance(item, torch.Tensor):
        is_plain = type(item) in (torch.Tensor, torch.nn.Parameter) and is_storable(item.data)
        return is_plain and item.numel() * item.element_size() >= LARGE_BYTES
    return (
        type(item) is np.ndarray
        and item.nbytes >= LARGE_BYTES
        and item.dtype.name in ITEM_BYTES
        and item.dtype.isnative
    )


def _taken(item: Any, pieces: list[Piece]) -> Tagged:
    name, is_array = str(len(pieces)), isinstance(item, np.ndarray)
    if is_array:
        host = torch.from_numpy(np.array(item, order="C"))
    else:
        plain = item.detach().resolve_conj().resolve_neg()
        host = torch.empty(plain.shape, dtype=plain.dtype).copy_(plain)
    dtype = str(host.dtype).removeprefix("torch.")
    whole = Interval(0, host.numel())
    fragment = Fragment(TensorKey(KIND_CLIENT, name), dtype, tuple(host.shape), whole)
    pieces.append((fragment, host.reshape(-1)))
    place = Tagged(STORED, (name, is_array))
    if isinstance(item, torch.nn.Parameter):
        return Tagged(PARAMETER, (item.requires_grad, place))
    return place
