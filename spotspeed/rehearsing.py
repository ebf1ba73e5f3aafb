"""A rank's part in `spotspeed certify`: train so many steps, log the losses, save, end."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

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
        engine: Any = checkpointer.engine
        engine.backward = self._recording(engine.backward)

    def before_update(self, engine: Any) -> None:
        self.inner.before_update(engine)

    def after_update(self, engine: Any) -> None:
        self.inner.after_update(engine)
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

    def _recording(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """`engine.backward`, which notes all bits of the loss that it is given."""

        def record(loss: Any, *args: Any, **kwargs: Any) -> Any:
            step = int(self.inner.engine.global_steps) + 1
            bits = struct.pack("<d", float(loss.detach())).hex()
            self._losses.append(f"{step} {self._micro_step} {bits}\n")
            self._micro_step += 1
            return backward(loss, *args, **kwargs)

        return record

    def _end(self) -> NoReturn:
        """Save, make it durable, leave the losses, and end the script on all ranks."""
        self.inner.save(TAG).wait()
        self.inner.close()
        self._file.write_text("".join(self._losses))
        raise SystemExit(0)


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
