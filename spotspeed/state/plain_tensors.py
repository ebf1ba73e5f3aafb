"""Torch's values as plain data, and back: tensors, sizes, dtypes, devices, generators' states."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from spotspeed.core.layout import ITEM_BYTES
from spotspeed.core.plain import ArrayData, Refused, Tagged
from spotspeed.core.plain_codes import MAX_DEPTH
from spotspeed.errors import FormatError
from spotspeed.state.plain_objects import OBJECT_TAGS, put_together, take_apart

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: dtype
    for name in ITEM_BYTES
    if isinstance(dtype := getattr(torch, name, None), torch.dtype)
}
"""Torch's dtype for every dtype name of the format that this torch has."""

PARAMETER = "torch.nn.Parameter"
"""Tag of a parameter: whether it requires a gradient, and its tensor."""
_CONTAINERS = frozenset({list, tuple, dict, set, frozenset, OrderedDict, Counter})
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def to_plain(value: Any) -> Any:
    """`value` with objects of torch and the standard library replaced by what `core.plain` stores.

    Tensors are copied to host memory: their device, gradient and memory layout are not kept.
    Everything else passes through, and a tensor without plain bytes becomes `Refused`, so that
    `core.plain.encode` names what cannot be stored.
    """
    return _convert(value, _DOWN, frozenset())


def from_plain(value: Any) -> Any:
    """The inverse of `to_plain`; tensors are on the CPU and own their memory.

    Raises FormatError for a tag or dtype that this version does not know.
    """
    return _convert(value, _UP, frozenset())


def is_storable(value: torch.Tensor) -> bool:
    """Whether a tensor has plain bytes of a dtype that the format knows."""
    return not _refusal(value)


def replace_leaves(value: Any, leaf: Callable[[Any], Any], *, is_plain: bool) -> Any:
    """`value` with each object that is no container of plain data replaced by `leaf` of it.

    Unless `value` `is_plain` already, the objects in it are taken apart, as `to_plain` does.
    """
    way = _Way(_as_it_is if is_plain else take_apart, Tagged, leaf)
    return _convert(value, way, frozenset())


@dataclass(frozen=True, slots=True)
class _Way:
    """What is done to objects before their parts, to their parts put together, and to leaves."""

    open: Callable[[Any], Any]
    close: Callable[[str, Any], Any]
    leaf: Callable[[Any], Any]


def _convert(original: Any, way: _Way, open_ids: frozenset[int]) -> Any:
    value = way.open(original)
    kind = type(value)
    is_object = kind is Tagged and value.tag in OBJECT_TAGS
    if kind not in _CONTAINERS and not is_object:
        return way.leaf(value)
    if id(original) in open_ids or len(open_ids) > MAX_DEPTH:
        # `encode` refuses cycles and excessive depth, and names them.
        return value if value is original else Refused("refers to itself, or is nested too deeply")
    inside = open_ids | {id(original)}
    if is_object:
        return way.close(value.tag, _convert(value.value, way, inside))
    if kind is Counter:
        return Counter({_convert(key, way, inside): count for key, count in value.items()})
    if kind is dict or kind is OrderedDict:
        return kind((_convert(key, way, inside), _convert(item, way, inside))
                    for key, item in value.items())  # fmt: skip
    return kind([_convert(item, way, inside) for item in value])


def _as_it_is(value: Any) -> Any:
    return value


def _lower(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _lower_tensor(value)
    if isinstance(value, torch.Size):
        return Tagged("torch.Size", tuple(value))
    if isinstance(value, torch.dtype):
        return Tagged("torch.dtype", str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return Tagged("torch.device", str(value))
    return value


def _lower_tensor(value: torch.Tensor) -> Any:
    if type(value) is torch.nn.Parameter:
        data = _lower_tensor(value.data)
        if isinstance(data, Refused):
            return data
        return Tagged(PARAMETER, (value.requires_grad, data))
    refusal = _refusal(value)
    if refusal:
        return Refused(refusal)
    host = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    data = host.reshape(-1).view(torch.uint8).numpy().tobytes() if host.numel() else b""
    return ArrayData(_NAMES[value.dtype], tuple(value.shape), data)


def _refusal(value: torch.Tensor) -> str:
    """Why a tensor cannot be stored as plain bytes, and what to give instead; "" if it can."""
    if type(value) is not torch.Tensor:
        kind = type(value)
        return (f"a tensor of type {kind.__module__}.{kind.__qualname__} cannot be stored: give "
                f"a plain one, as by .as_subclass(torch.Tensor)")  # fmt: skip
    if value.is_meta:
        return "a tensor on the meta device has no values that could be stored"
    if value.is_quantized:
        return "a quantized tensor cannot be stored: give its int_repr(), scales and zero points"
    if value.layout is not torch.strided:
        return f"a tensor of layout {value.layout} cannot be stored: give its to_dense()"
    if value.dtype not in _NAMES:
        return f"tensors of {value.dtype} cannot be stored"
    return ""


def _raise_up(value: Any) -> Any:
    if isinstance(value, ArrayData):
        return _tensor(value)
    if isinstance(value, Tagged):
        build = _TAGS.get(value.tag)
        if build is None:
            raise FormatError(f"plain data has the tag {value.tag!r}, which is unknown here")
        try:
            return build(value.value)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise FormatError(f"plain data: {value.tag}: {error}") from None
    return value


def _tensor(value: ArrayData) -> torch.Tensor:
    dtype = TORCH_DTYPES.get(value.dtype)
    if dtype is None:
        raise FormatError(f"a tensor of {value.dtype}, which torch {torch.__version__} lacks")
    if not value.data:
        return torch.empty(value.shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(value.data), dtype=torch.uint8)
    return flat.view(dtype).reshape(value.shape)


def _parameter(value: Any) -> torch.nn.Parameter:
    requires_grad, data = value
    if not isinstance(data, ArrayData | torch.Tensor) or not isinstance(requires_grad, bool):
        raise ValueError("needs requires_grad and a tensor")
    tensor = _tensor(data) if isinstance(data, ArrayData) else data
    return torch.nn.Parameter(tensor, requires_grad=requires_grad)


def _dtype(value: Any) -> torch.dtype:
    found = getattr(torch, value) if isinstance(value, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{value!r} is not a dtype")
    return found


def _size(value: Any) -> torch.Size:
    if not isinstance(value, tuple) or not all(type(item) is int for item in value):
        raise ValueError(f"{value!r} is not a size")
    return torch.Size(value)


def _device(value: Any) -> torch.device:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a device")
    return torch.device(value)


_TAGS: dict[str, Callable[[Any], Any]] = {
    PARAMETER: _parameter, "torch.Size": _size, "torch.dtype": _dtype,
    "torch.device": _device,
}  # fmt: skip
_DOWN = _Way(take_apart, Tagged, _lower)
_UP = _Way(_as_it_is, put_together, _raise_up)
