"""Attach to every engine that a script builds, without a change to the script."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from spotspeed.checkpointer import attach
from spotspeed.integrations import huggingface
from spotspeed.state import boundary
from spotspeed.state.engine import block_of

_FRAMEWORKS = ("accelerate", "lightning", "pytorch_lightning", "transformers")
"""Packages that restore by themselves, through engine.load_checkpoint."""
_seen: set[str] = set()
"""Paths of the blocks of the engines so far: a later engine does not go on where an earlier did."""


def install() -> None:
    """From now on, every DeepSpeedEngine whose config has a "spotspeed" block is attached.

    Engines that a script builds directly are restored at once from the newest durable checkpoint,
    so that `engine.global_steps` and `engine.global_samples` say where to go on; engines that a
    framework builds are restored when the framework loads. Of several engines with one path only
    the first is restored: what is there may be another engine's. Idempotent.
    """
    boundary.install_hooks()
    boundary.on_new_engine(_attach_new)
    huggingface.plug_in()


def _attach_new(engine: Any) -> None:
    block = block_of(engine)
    if block is None or engine.optimizer is None:
        return
    is_first = block.path not in _seen
    _seen.add(block.path)
    checkpointer = attach(engine)
    if is_first and not _is_built_by_framework():
        checkpointer.restore()


def _is_built_by_framework() -> bool:
    """Whether a module of a framework is among the callers of the engine's constructor."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in _FRAMEWORKS:
            return True
        frame = frame.f_back
    return False
