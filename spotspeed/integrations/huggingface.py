"""Hugging Face Trainer: what it keeps beside the engine is saved with it, and found by it again.

Trainer counts its steps and writes its small files after `engine.step()`, and at a start it looks
for directories `checkpoint-N`. A notice, and a save between its own, leave none. So its state is
recorded as late state at each step's end, and before the script looks, the newest checkpoint that
has it is given a directory (huggingface_files.py). Nothing of Trainer's own saving is replaced.

Classes of transformers are wrapped when it is imported; transformers is not imported here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import weakref
from types import ModuleType
from typing import Any

from spotspeed.checkpointer import Checkpointer
from spotspeed.config import find_block
from spotspeed.core import plain
from spotspeed.integrations.huggingface_batch import keep_global_batch
from spotspeed.integrations.huggingface_files import NAME, prepare
from spotspeed.state import boundary
from spotspeed.state.imports import after_import
from spotspeed.state.late import Frozen, Source
from spotspeed.state.plain_tensors import to_plain

_MARK = "_spotspeed_hook"
_LOOP = "_spotspeed_loop"
_engines: weakref.WeakSet[Any] = weakref.WeakSet()


def plug_in() -> None:
    """From now on every Trainer whose DeepSpeed config has a block is served; idempotent."""
    boundary.on_new_engine(_engines.add)
    after_import("transformers.training_args", _wrap_arguments)
    after_import("transformers.trainer_callback", _wrap_callbacks)


def _wrap_arguments(module: ModuleType) -> None:
    """Trainer's arguments are complete: the script has yet to look for checkpoints."""
    original = module.TrainingArguments.__post_init__
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        keep_global_batch(self)
        original(self)
        config = getattr(getattr(self, "hf_deepspeed_config", None), "config", None)
        block = None if config is None else find_block(config)
        if block is not None and self.output_dir:
            prepare(self.output_dir, block.path)

    setattr(__post_init__, _MARK, True)
    module.TrainingArguments.__post_init__ = __post_init__


def _wrap_callbacks(module: ModuleType) -> None:
    """A step of Trainer ends: its counts are those of the engine, and what it logs is logged."""
    handler, exportable = module.CallbackHandler, module.ExportableState
    step_end, log = handler.on_step_end, handler.on_log
    if getattr(step_end, _MARK, False):
        return

    @functools.wraps(step_end)
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **others: Any) -> Any:
        answer = step_end(self, args, state, control, **others)
        loop = vars(self).get(_LOOP) or _join(self, exportable)
        if loop is not None:
            loop.count(state, answer)
        return answer

    @functools.wraps(log)
    def on_log(self: Any, *args: Any, **others: Any) -> Any:
        answer = log(self, *args, **others)
        if (loop := vars(self).get(_LOOP)) is not None:
            loop.end_step()
        return answer

    setattr(on_step_end, _MARK, True)
    handler.on_step_end, handler.on_log = on_step_end, on_log


def _join(handler: Any, exportable: Any) -> _Loop | None:
    """Tie the loop of `handler` to the checkpointer of its engine, if that has one.

    It is the engine of its model or, where something wraps the model, the only one there is.
    """
    found = {engine: binding.hooks for engine in _engines
             if (binding := boundary.binding_of(engine)) is not None
             and isinstance(binding.hooks, Checkpointer)}  # fmt: skip
    own = [hooks for engine, hooks in found.items() if engine.module is handler.model]
    for hooks in own or (found.values() if len(found) == 1 else ()):
        loop = _Loop(hooks, handler, exportable)
        setattr(handler, _LOOP, loop)
        return loop
    return None


class _Loop:
    """One training loop of a Trainer, whose state is late state of one engine."""

    def __init__(self, checkpointer: Checkpointer, handler: Any, exportable: Any) -> None:
        self._checkpointer, self._exportable = checkpointer, exportable
        self._handler = weakref.ref(handler)
        self._state: Any = None
        self._control: Any = None

    def count(self, state: Any, control: Any) -> None:
        """The step is counted; it has ended, too, unless there is something to log of it."""
        is_first = self._state is None
        self._state, self._control = state, control
        if is_first:
            self._checkpointer.add_late(NAME, Source(self._freeze))
        if not control.should_log:
            self.end_step()

    def end_step(self) -> None:
        """Record the loop as it is."""
        self._checkpointer.end_step()

    def _freeze(self) -> Frozen:
        """What Trainer would write now; only rank 0 keeps it, as only rank 0 writes it."""
        state, steps = self._state, int(self._checkpointer.engine.global_steps)
        handler = self._handler()
        if handler is None or state.global_step != steps or not state.is_world_process_zero:
            return lambda: plain.encode({}, what=NAME)
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)
                  if field.name != "log_history"}  # fmt: skip
        fields["stateful_callbacks"] = self._callback_states(handler)
        # The history only grows at its end, so that its length alone is this moment's.
        small, history, count = json.dumps(fields), state.log_history, len(state.log_history)
        scheduler = handler.lr_scheduler
        # DeepSpeed's own scheduler is in the engine's state; any other one is Trainer's to keep.
        is_ours = scheduler is None or type(scheduler).__name__ == "DeepSpeedSchedulerWrapper"
        schedule = None if is_ours else plain.encode(
            to_plain(scheduler.state_dict()), what="scheduler"
        )  # fmt: skip

        def encode() -> bytes:
            whole = {**json.loads(small), "log_history": history[:count]}
            text = json.dumps(whole, indent=2, sort_keys=True) + "\n"
            return plain.encode({"step": steps, "state": text, "schedule": schedule}, what=NAME)

        return encode

    def _callback_states(self, handler: Any) -> dict[str, Any]:
        """As Trainer collects them when it saves."""
        found: dict[str, Any] = {}
        for callback in [*handler.callbacks, self._control]:
            if isinstance(callback, self._exportable):
                found.setdefault(type(callback).__name__, []).append(callback.state())
        return {name: states[0] if len(states) == 1 else states for name, states in found.items()}
