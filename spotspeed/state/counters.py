"""The engine's counts of steps and samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spotspeed.errors import FormatError
from spotspeed.state import gradients

_NAMES = ("global_steps", "global_samples", "skipped_steps")


def capture(engine: Any) -> dict[str, int]:
    """The counts as they are at a boundary."""
    return {name: int(getattr(engine, name)) for name in _NAMES}


def apply(engine: Any, state: Mapping[str, Any]) -> None:
    """Set the counts; `micro_steps` becomes 0, because a boundary is where it starts anew."""
    if set(state) != set(_NAMES) or any(type(value) is not int for value in state.values()):
        raise FormatError(f"stored counts {dict(state)!r}: expected {', '.join(_NAMES)}")
    for name in _NAMES:
        setattr(engine, name, state[name])
    engine.micro_steps = 0
    gradients.forget(engine)
