"""Attach to every engine that a script builds, without a change to the script."""

from __future__ import annotations

import logging
import os
import sys
from types import FrameType
from typing import Any

from spotspeed import children
from spotspeed.attachment import attach_next
from spotspeed.coordinator.notice.workplace import path_hint
from spotspeed.errors import CaptureError, ReshardError, UnsupportedLayoutError
from spotspeed.integrations import deepspeed_consolidate, deepspeed_universal, huggingface
from spotspeed.state import boundary
from spotspeed.state.engine import block_of
from spotspeed.state.probe import has_optimizer
from spotspeed.unattached import Unattached

_logger = logging.getLogger("spotspeed")
_FRAMEWORKS = ("accelerate", "lightning", "pytorch_lightning", "transformers")
"""Packages that restore by themselves, through engine.load_checkpoint."""
_refused: set[str] = set()
"""Why engines were left to DeepSpeed: said once each."""


def install() -> None:
    """From now on, every DeepSpeedEngine whose config has a "spotspeed" block is attached.

    Engines that a script builds directly are restored at once from the newest durable checkpoint,
    so that `engine.global_steps` and `engine.global_samples` say where to go on; engines that a
    framework builds are restored when the framework loads. Of several engines with one path each
    has a place of its own: the second one made lives at `engine-2` below the path, and so on.
    Idempotent.

    An engine whose layout spotspeed does not know, or whose scheduler or buffers it cannot store,
    is left to DeepSpeed's own save_checkpoint and load_checkpoint, with a warning that says so.
    DeepSpeed's `zero_to_fp32` functions read what spotspeed has saved, its `ds_to_universal` takes
    it as converted, and the processes that this one starts through multiprocessing install the
    hooks as well.

    One path is one job: an engine of another model than the checkpoints there are of is refused
    (InvalidLayoutError), and so is one in another process while the first lives (OwnedError), as
    nobody else can tell them from a job that was changed or started twice by mistake. But worlds
    that one script starts by multiprocessing are its own: where one lives, or has left checkpoints
    of another model, or has come to its end, the next takes the next place; and so does an engine
    of another model where all checkpoints belong to directories that somebody saved to.
    """
    boundary.install_hooks()
    boundary.on_new_engine(_attach_new)
    deepspeed_consolidate.plug_in()
    deepspeed_universal.plug_in()
    children.pass_on()
    huggingface.plug_in()


def _attach_new(engine: Any) -> None:
    block = block_of(engine, path_hint=path_hint(os.environ))
    if block is None:
        return
    if not has_optimizer(engine):
        boundary.bind(engine, Unattached(block, optimizer=""))
        return
    try:
        checkpointer = attach_next(engine)
    except (UnsupportedLayoutError, CaptureError) as error:
        boundary.bind(engine, Unattached(block, optimizer=type(engine.optimizer).__name__))
        return _leave_to_deepspeed(str(error))
    while not _is_built_by_framework() and not checkpointer.progress.is_prepared:
        try:
            checkpointer.restore()
            checkpointer.progress.is_prepared = True
        except ReshardError as error:
            if not checkpointer.progress.may_step_aside:
                raise
            where = checkpointer.storage.url
            checkpointer = attach_next(engine)
            _logger.warning(
                "the checkpoints at %s are of another model, so this engine begins at %s: give "
                "each model a path of its own (%s)",
                where, checkpointer.storage.url, str(error).partition("\n")[0],
            )  # fmt: skip


def _leave_to_deepspeed(why: str) -> None:
    if why not in _refused:
        _refused.add(why)
        _logger.warning(
            "this engine is not protected by spotspeed: DeepSpeed saves and loads it, and a notice "
            "ends it without a checkpoint (%s)", why,
        )  # fmt: skip


def _is_built_by_framework() -> bool:
    """Whether a module of a framework is among the callers of the engine's constructor."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in _FRAMEWORKS:
            return True
        frame = frame.f_back
    return False
