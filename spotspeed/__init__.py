"""Checkpoints for DeepSpeed training on machines that can be taken away.

Public names are imported when they are first used, so that the saver process and the command line
start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spotspeed.checkpointer import Checkpointer, Restored, attach
    from spotspeed.errors import SpotSpeedError

__version__ = "0.1.0"

_HOMES = {
    "Checkpointer": "spotspeed.checkpointer",
    "Restored": "spotspeed.checkpointer",
    "SpotSpeedError": "spotspeed.errors",
    "attach": "spotspeed.checkpointer",
}

__all__ = ["Checkpointer", "Restored", "SpotSpeedError", "__version__", "attach"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
