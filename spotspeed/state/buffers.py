"""Module buffers: copied at every step boundary, because the next forward changes them.

All of `named_buffers()` are kept, persistent or not: a step may depend on any of them. A copy costs
one pass over the buffers and one more set of them in the buffers' own memory for each record that
is kept (two, and one more while a save reads an older one).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spotspeed.core.interval import Interval
from spotspeed.core.layout import KIND_BUFFER, Fragment, Holding, StoredTensor, TensorKey
from spotspeed.errors import CaptureError, InvalidLayoutError
from spotspeed.state.piece import Piece, dtype_name
from spotspeed.state.plain_tensors import TORCH_DTYPES


@dataclass(frozen=True, slots=True)
class BufferCopy:
    """Contiguous copies of all buffers, by name; nothing writes to them while they are held."""

    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    layout: object
    """Equal (the same object) for copies of the same set of live tensors."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the module keeps one buffer; the tensor itself may be replaced at any time."""

    name: str
    module: torch.nn.Module
    key: str


class Buffers:
    """The buffers of one module tree; all calls but `pieces` belong to the training's thread."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._places: tuple[_Place, ...] = ()
        self._dicts: list[dict[str, Any]] = []
        self._count = -1
        self._known: list[torch.Tensor | None] = []
        self._layout = object()
        self._targets: list[tuple[_Place, torch.Tensor]] = []

    def copy(self, spare: BufferCopy | None) -> BufferCopy:
        """The buffers as they are now, in the memory of `spare` where that fits."""
        self._find_places()
        live = [place.module._buffers[place.key] for place in self._places]
        sources = [tensor for tensor in live if tensor is not None]
        if not sources:
            return _NOTHING
        if len(live) != len(self._known) or not all(map(operator.is_, live, self._known)):
            self._known, self._layout = live, object()
        with torch.no_grad():
            # A tensor keeps its device and dtype for life, but it may be resized.
            is_alike = spare is not None and spare.layout is self._layout
            if spare is not None and is_alike and _same_shapes(spare.tensors, sources):
                torch._foreach_copy_(spare.tensors, sources)
                return spare
            copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in sources]
        names = [place.name for place, tensor in zip(self._places, live, strict=True)
                 if tensor is not None]  # fmt: skip
        return BufferCopy(tuple(names), tuple(copies), self._layout)

    def check(self) -> None:
        """Raise CaptureError, naming the buffer, when one cannot be stored."""
        for name, tensor in self._module.named_buffers():
            if tensor.layout is not torch.strided or tensor.is_meta:
                raise CaptureError(f"buffer {name}: {tensor.layout} on {tensor.device}")
            if dtype_name(tensor) not in TORCH_DTYPES:
                raise CaptureError(f"buffer {name}: tensors of {tensor.dtype} cannot be stored")

    def pieces(self, copied: BufferCopy, scope: str) -> list[Piece]:
        """The copies as pieces of kind "buffer"; they stay the copy's memory."""
        return [
            _piece(TensorKey(KIND_BUFFER, name, scope), tensor)
            for name, tensor in zip(copied.names, copied.tensors, strict=True)
        ]

    def targets(self, stored: Mapping[TensorKey, StoredTensor]) -> list[Piece]:
        """What to fill, in place where the live buffer is contiguous; then call `finish`.

        `stored` are the buffers of one old rank, whose scope the keys keep. A buffer that is
        registered as None here is made; one that is not registered at all is left out (the first
        forward may register it). A live buffer that is not stored, or of another shape or dtype,
        raises InvalidLayoutError if it is persistent and is left alone if not.
        """
        self._count = -1
        self._find_places()
        self._targets = []
        by_name = {key.name: (key, tensor) for key, tensor in stored.items()}
        pieces: list[Piece] = []
        for place in self._places:
            live = place.module._buffers[place.key]
            found = by_name.get(place.name)
            if found is None:
                self._refuse_persistent(place, live, None)
                continue
            if live is None:
                target = torch.empty(found[1].shape, dtype=TORCH_DTYPES[found[1].dtype],
                                     device=self._device())  # fmt: skip
                self._targets.append((place, target))
            elif (found[1].dtype, found[1].shape) != _geometry(live):
                self._refuse_persistent(place, live, found[1])
                continue
            elif live.is_contiguous():
                target = live.detach()
            else:
                target = torch.empty_like(live, memory_format=torch.contiguous_format)
                self._targets.append((place, target))
            pieces.append(_piece(found[0], target))
        return pieces

    def finish(self) -> None:
        """Move what was read for buffers that could not be filled in place."""
        for place, filled in self._targets:
            live = place.module._buffers[place.key]
            if live is None or _overlaps_itself(live):
                place.module._buffers[place.key] = filled
            else:
                live.detach().copy_(filled)
        self._targets = []

    def _find_places(self) -> None:
        """List the buffers anew when one was added or removed since the last time."""
        count = sum(map(len, self._dicts))
        if count == self._count:
            return
        modules = dict(self._module.named_modules())
        seen: set[int] = set()
        places: list[_Place] = []
        for prefix, module in modules.items():
            for key, tensor in module._buffers.items():
                if tensor is not None and id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                places.append(_Place(f"{prefix}.{key}" if prefix else key, module, key))
        self._places = tuple(places)
        self._dicts = [module._buffers for module in modules.values()]
        self._count = sum(map(len, self._dicts))

    def _device(self) -> torch.device:
        """Where the model computes, as its parameters tell."""
        return next((tensor.device for tensor in self._module.parameters()), torch.device("cpu"))

    def _refuse_persistent(
        self, place: _Place, live: torch.Tensor | None, found: StoredTensor | None
    ) -> None:
        if live is None or place.key in place.module._non_persistent_buffers_set:
            return
        if found is None and not live.numel():
            return  # Nothing is stored of a buffer without elements.
        what = "not in the checkpoint" if found is None else f"{found.dtype}{list(found.shape)}"
        dtype, shape = _geometry(live)
        raise InvalidLayoutError(
            f"buffer {place.name} is {dtype}{list(shape)} in the model and {what} as stored; the "
            f"checkpoint is of another model"
        )


def transient_buffers(module: torch.nn.Module) -> list[str]:
    """Names of the buffers that are no part of the module's `state_dict`."""
    return sorted(
        f"{prefix}.{key}" if prefix else key
        for prefix, part in module.named_modules()
        for key in part._non_persistent_buffers_set
    )


_NOTHING = BufferCopy((), (), None)


def _piece(key: TensorKey, tensor: torch.Tensor) -> Piece:
    dtype, shape = _geometry(tensor)
    fragment = Fragment(key, dtype, shape, Interval(0, tensor.numel()))
    return Piece(Holding(fragment), tensor.view(-1))


def _geometry(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    return dtype_name(tensor), tuple(tensor.shape)


def _same_shapes(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> bool:
    return [tensor.shape for tensor in targets] == [tensor.shape for tensor in sources]


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    return any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
