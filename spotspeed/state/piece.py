"""One contiguous run of live training state, and the element views it is made of."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, Holding
from spotspeed.errors import CaptureError


@dataclass(frozen=True, slots=True)
class Piece:
    """A fragment this rank holds and the 1-D contiguous tensor of exactly its elements.

    The tensor is a view of the training's memory, owned by the training and constant from the end
    of one optimizer step to the start of the next, or a copy where the state is a Python number
    or is not contiguous. A target of a restore is filled through the same view.
    """

    holding: Holding
    tensor: torch.Tensor

    def __post_init__(self) -> None:
        fragment, tensor = self.holding.fragment, self.tensor
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise CaptureError(f"{fragment.key}: shape {tuple(tensor.shape)} is not a flat run")
        if (tensor.numel(), dtype_name(tensor)) != (fragment.interval.count, fragment.dtype):
            raise CaptureError(
                f"{fragment.key}: {tensor.numel()} elements of {dtype_name(tensor)} stand for "
                f"{fragment.interval.count} of {fragment.dtype}"
            )

    @property
    def fragment(self) -> Fragment:
        return self.holding.fragment

    @property
    def share(self) -> Piece:
        """The part that this rank writes; it may be empty."""
        share = self.holding.share
        if share is self.fragment:
            return self
        start = share.interval.start - self.fragment.interval.start
        return Piece(Holding(share), self.tensor.narrow(0, start, share.interval.count))

    def view(self) -> memoryview:
        """The bytes of a tensor in host memory, writable and shared with it.

        Raises CaptureError for a tensor in device memory.
        """
        if self.tensor.device.type != "cpu":
            raise CaptureError(f"{self.fragment.key}: on {self.tensor.device}, not in host memory")
        return self.tensor.view(torch.uint8).numpy().data


def dtype_name(tensor: torch.Tensor) -> str:
    """torch's name for the tensor's dtype, as the format writes it ("float32")."""
    return _name_of(tensor.dtype)


@functools.cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a name of the format; raises CaptureError when torch lacks it."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CaptureError(f"dtype {name!r}: torch {torch.__version__} has none of that name")
    return found


def flat_elements(tensor: torch.Tensor) -> torch.Tensor:
    """All elements in row-major order as one dimension: a view if the tensor is contiguous."""
    return tensor.detach().contiguous().view(-1)


def write_elements(target: torch.Tensor, elements: torch.Tensor) -> None:
    """Copy `elements` (1-D, row-major) into `target` in place, converting its dtype."""
    target.detach().copy_(elements.view(target.shape))


def run_of(tensor: torch.Tensor, start: int, interval: Interval) -> torch.Tensor:
    """The view of `interval.count` elements of a 1-D tensor, from `start` on."""
    return tensor.narrow(0, start, interval.count)
