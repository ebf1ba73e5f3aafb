"""A rank's part in `spotspeed certify`: train so many steps, log the losses, save, end."""

from __future__ import annotations

import functools
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from spotspeed.checkpointer import Checkpointer
from spotspeed.config import IntervalConfig, NoticeConfig, SpotSpeedConfig
from spotspeed.rehearsal import TAG, Rehearsal
from spotspeed.state import boundary
from spotspeed.storage import open_storage


def redirected(rehearsal: Rehearsal, config: SpotSpeedConfig) -> SpotSpeedConfig:
    """The block, led to the scratch path, without saves or notices of its own accord."""
    return config.model_copy(update={
        "path": rehearsal.path, "local_path": None, "interval": IntervalConfig(seconds=None),
        "notice": NoticeConfig(signals=(), cloud="none"),
    })  # fmt: skip


class Rehearsing:
    """The hooks of a rehearsed engine: its checkpointer's, and after the last step the end."""

    def __init__(
        self, checkpointer: Checkpointer, binding: boundary.Binding, rehearsal: Rehearsal
    ) -> None:
        self.inner, self._binding = checkpointer, binding
        self._left = rehearsal.steps
        self._losses: list[str] = []
        self._micro_step = 0
        place = Path(rehearsal.log)
        place.mkdir(parents=True, exist_ok=True)
        self._file = place / f"rank-{checkpointer.rank:05d}.losses"
        watch_backward(checkpointer.engine, self._note)

    def before_update(self, engine: Any) -> None:
        self.inner.before_update(engine)

    def after_update(self, engine: Any) -> None:
        self.inner.after_update(engine)
        self._losses.append(f"{int(engine.global_steps)}\n")
        self._left -= 1
        self._micro_step = 0
        if not self._left:
            # What the loop still does belongs to this step: the end is the next one's beginning.
            self._binding.watches_forward = True

    def before_forward(self, engine: Any) -> None:
        if self._left <= 0:
            self._end()
        self.inner.before_forward(engine)

    def on_save(self, engine: Any, arguments: Mapping[str, Any]) -> Any:
        return self.inner.on_save(engine, arguments)

    def on_load(self, engine: Any, arguments: Mapping[str, Any], original: boundary.Loader) -> Any:
        return self.inner.on_load(engine, arguments, original)

    def on_destroy(self, engine: Any) -> None:
        self.inner.on_destroy(engine)

    def _note(self, loss: Any) -> None:
        """Keep all bits of the loss that a backward begins from."""
        step = int(self.inner.engine.global_steps) + 1
        bits = struct.pack("<d", float(loss.detach())).hex()
        self._losses.append(f"{step} {self._micro_step} {bits}\n")
        self._micro_step += 1

    def _end(self) -> NoReturn:
        """Save, make it durable, leave the losses, and end the script on all ranks."""
        self.inner.save(TAG).wait()
        self.inner.close()
        self._file.write_text("".join(self._losses))
        raise SystemExit(0)


def watch_backward(engine: Any, note: Callable[[Any], None]) -> None:
    """Tell `note` every loss of `engine`, in this process for good.

    On the class, because a PipelineEngine calls its base's method; and in torch, because a script
    may call `backward` of the loss itself.
    """
    owner: Any = next(cls for cls in reversed(type(engine).__mro__) if "backward" in vars(cls))
    engine_backward, torch_backward = owner.backward, torch.autograd.backward
    depth = 0

    @functools.wraps(engine_backward)
    def from_engine(self: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        if self is engine:
            note(loss)
        depth += 1
        try:
            return engine_backward(self, loss, *args, **kwargs)
        finally:
            depth -= 1

    @functools.wraps(torch_backward)
    def from_loss(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        if not depth:
            grads = [grad_tensors] if _is_tensor(grad_tensors) else list(grad_tensors or ())
            if all(grad is None for grad in grads):
                for loss in [tensors] if _is_tensor(tensors) else tensors:
                    note(loss)
        torch_backward(tensors, grad_tensors, *args, **kwargs)

    owner.backward = from_engine
    torch.autograd.backward = from_loss


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def rehearse(checkpointer: Checkpointer, rehearsal: Rehearsal, origin: str) -> None:
    """Let the engine of `checkpointer` do what `rehearsal` says; `origin` is the block's path."""
    if rehearsal.is_first:
        checkpointer.origin = open_storage(origin)
        # Generators that the job never seeds would tell its launches apart, and nothing else.
        random.seed(0)
        np.random.seed(0)
    binding = boundary.binding_of(checkpointer.engine)
    assert binding is not None
    binding.hooks = Rehearsing(checkpointer, binding, rehearsal)
