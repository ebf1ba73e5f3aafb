"""The learning-rate schedule and other schedules that advance with the steps."""

from __future__ import annotations

import types
from collections import Counter, OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

_SCHEDULERS = ("lr_scheduler", "random_ltd_scheduler")
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial)


def capture(engine: Any) -> dict[str, Any]:
    """The state of each scheduler the engine has; owns what a later step could change.

    Functions among the entries are left out: they are code, which the live scheduler has already.
    """
    found: dict[str, Any] = {}
    for name in _SCHEDULERS:
        scheduler = getattr(engine, name, None)
        if scheduler is not None and hasattr(scheduler, "state_dict"):
            found[name] = {
                "class": type(scheduler).__qualname__,
                "state": {
                    key: _own(value)
                    for key, value in scheduler.state_dict().items()
                    if not isinstance(value, _FUNCTIONS)
                },
            }
    return found


def apply(engine: Any, state: Mapping[str, Any]) -> list[str]:
    """Load each scheduler's state; returns what has no counterpart of the same class here."""
    notes: list[str] = []
    for name in _SCHEDULERS:
        stored, scheduler = state.get(name), getattr(engine, name, None)
        live_class = None if scheduler is None else type(scheduler).__qualname__
        if stored is not None and stored["class"] == live_class:
            assert scheduler is not None
            scheduler.load_state_dict(stored["state"])
        elif stored is not None or live_class is not None:
            stored_class = None if stored is None else stored["class"]
            notes.append(f"{name}: stored {stored_class}, here {live_class}: left as it was")
    return notes


def show_rates(engine: Any, optimizer: Any) -> None:
    """Let `get_last_lr` of DeepSpeed's schedulers, which do not store it, report the rates."""
    scheduler: Any = getattr(engine, "lr_scheduler", None)
    if type(scheduler).__module__.startswith("deepspeed.") and hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [_own(group["lr"]) for group in optimizer.param_groups]


def _own(value: Any) -> Any:
    """A copy of plain containers and tensors; anything else is shared, and refused when stored."""
    kind = type(value)
    if kind is dict or kind is OrderedDict:
        return kind((key, _own(item)) for key, item in value.items())
    if kind is list or kind is tuple:
        return kind([_own(item) for item in value])
    if kind is Counter or kind is set:
        return kind(value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
