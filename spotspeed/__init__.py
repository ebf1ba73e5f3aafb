"""Checkpoints for DeepSpeed training on machines that can be taken away.

Public names are imported when they are first used, so that the saver process and the command line
start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spotspeed.state.batch import explain_batches

if TYPE_CHECKING:
    from spotspeed.api import async_save, load, save
    from spotspeed.attachment import attach
    from spotspeed.checkpoint.catalog import CheckpointInfo
    from spotspeed.checkpoint.opened import OpenedCheckpoint, list_checkpoints, open_checkpoint
    from spotspeed.checkpoint.queue import SaveHandle
    from spotspeed.checkpoint.restore import Restored
    from spotspeed.checkpointer import Checkpointer
    from spotspeed.core.sample_order import GlobalSampler
    from spotspeed.errors import SpotSpeedError
    from spotspeed.launch import install
    from spotspeed.state.workers import worker_init_fn

__version__ = "0.1.0"

_HOMES = {
    "CheckpointInfo": "spotspeed.checkpoint.catalog",
    "Checkpointer": "spotspeed.checkpointer",
    "GlobalSampler": "spotspeed.core.sample_order",
    "OpenedCheckpoint": "spotspeed.checkpoint.opened",
    "Restored": "spotspeed.checkpoint.restore",
    "SaveHandle": "spotspeed.checkpoint.queue",
    "SpotSpeedError": "spotspeed.errors",
    "async_save": "spotspeed.api",
    "attach": "spotspeed.attachment",
    "install": "spotspeed.launch",
    "list_checkpoints": "spotspeed.checkpoint.opened",
    "open_checkpoint": "spotspeed.checkpoint.opened",
    "load": "spotspeed.api",
    "save": "spotspeed.api",
    "worker_init_fn": "spotspeed.state.workers",
}

__all__ = [
    "CheckpointInfo",
    "Checkpointer",
    "GlobalSampler",
    "OpenedCheckpoint",
    "Restored",
    "SaveHandle",
    "SpotSpeedError",
    "__version__",
    "async_save",
    "attach",
    "install",
    "list_checkpoints",
    "load",
    "open_checkpoint",
    "save",
    "worker_init_fn",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _on_refusal() -> None:
    importlib.import_module("spotspeed.exit").watch_refusals()


explain_batches(_on_refusal)
