"""Keep DataLoaders that start between a resume and the first step from drawing random numbers.

Making a DataLoader's iterator draws a seed from torch's default generator. The uninterrupted run
drew it before its first step, so the restored generator is already past that draw; drawing again
would shift every dropout mask after the resume.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.data import DataLoader

_is_holding = False


def hold() -> None:
    """From now on, starting a DataLoader leaves torch's default generator as it was."""
    global _is_holding
    _wrap_once()
    _is_holding = True


def release() -> None:
    """The first step after the resume begins: DataLoaders draw their seeds as ever."""
    global _is_holding
    _is_holding = False


def _wrap_once() -> None:
    original = DataLoader._get_iterator
    if getattr(original, "_is_spotspeed", False):
        return

    @functools.wraps(original)
    def get_iterator(loader: DataLoader[Any]) -> Any:
        if not _is_holding:
            return original(loader)
        before = torch.get_rng_state()
        try:
            return original(loader)
        finally:
            torch.set_rng_state(before)

    get_iterator._is_spotspeed = True  # type: ignore[attr-defined]
    DataLoader._get_iterator = get_iterator  # type: ignore[method-assign,assignment]
