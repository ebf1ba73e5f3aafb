"""Hooks at the step boundary of DeepSpeedEngine, installed on the class, bound per engine.

Why the class and why these methods: `_take_model_step` is the one place where an update begins and
ends, for DeepSpeedEngine and PipelineEngine alike, overflow-skipped updates included; patches on an
instance are ignored by PipelineEngine. An engine without hooks runs as if nothing were installed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from spotspeed.errors import CaptureError


class _Pass:
    def __repr__(self) -> str:
        return "PASS"


PASS: Final = _Pass()
"""Returned by `on_save` or `on_load`: let DeepSpeed's own method run, as its `original` does."""


Loader = Callable[[], Any]
"""DeepSpeed's own `load_checkpoint` of an engine, as it was called."""


class StepHooks(Protocol):
    """What an engine calls, always on the thread that calls the engine.

    An exception raised by a hook ends the engine's call with that exception.
    """

    def before_update(self, engine: Any) -> None:
        """Update `global_steps + 1` is about to change the state."""

    def after_update(self, engine: Any) -> None:
        """The update is complete; not called when it raised."""

    def before_forward(self, engine: Any) -> None:
        """A forward begins; only called while the binding's `watches_forward` is true.

        For a PipelineEngine, whose stages come to their forwards one after the other: a batch
        begins (`train_batch`, `eval_batch`), on all stages alike.
        """

    def on_save(self, engine: Any, arguments: Mapping[str, Any]) -> Any:
        """`save_checkpoint` was called; `arguments` by parameter name, defaults included.

        What is returned is returned to the caller, unless it is PASS.
        """

    def on_load(self, engine: Any, arguments: Mapping[str, Any], original: Loader) -> Any:
        """`load_checkpoint` was called; as `on_save`. `original` is DeepSpeed's own, so called."""

    def on_destroy(self, engine: Any) -> None:
        """The engine is about to be destroyed; called once, the engine is unbound already."""


class Binding:
    """The tie between one engine and its hooks; the engine owns it, nothing global does."""

    __slots__ = ("forwards", "hooks", "watches_forward")

    def __init__(self, hooks: StepHooks) -> None:
        self.hooks = hooks
        self.watches_forward = False
        """Set from any thread: whether the next forwards call `before_forward`."""
        self.forwards = 0
        """Forwards in training mode that have begun since."""


_KEY = "_spotspeed_binding"
_BATCH_METHODS = ("train_batch", "eval_batch")
_MARK = "_spotspeed_hook"
_new_engine_callbacks: list[Callable[[Any], None]] = []


def install_hooks(engine_class: type | None = None) -> None:
    """Wrap the methods of DeepSpeedEngine (or of `engine_class`); again is harmless.

    The wraps keep name, docstring and signature. `__init__` is wrapped in known subclasses too, so
    that `on_new_engine` fires when the whole engine is made, not when its base is. Raises
    CaptureError when this DeepSpeed lacks one of the methods.
    """
    if engine_class is None:
        from deepspeed.runtime.engine import DeepSpeedEngine

        engine_class = DeepSpeedEngine
    missing = [name for name in _WRAPS if not callable(getattr(engine_class, name, None))]
    if missing:
        raise CaptureError(
            f"{engine_class.__qualname__} has no {', '.join(missing)}: this version of DeepSpeed "
            f"is not supported"
        )
    for name, wrap in _WRAPS.items():
        _wrap(engine_class, name, wrap)
    for subclass in _subclasses(engine_class):
        if "__init__" in vars(subclass):
            _wrap(subclass, "__init__", _wrap_init)
        for name in _BATCH_METHODS:
            if name in vars(subclass):
                _wrap(subclass, name, _wrap_batch)


def bind(engine: Any, hooks: StepHooks) -> Binding:
    """Let `engine` call `hooks` until it is unbound or destroyed; installs the wraps if needed.

    Raises CaptureError when the engine has hooks already.
    """
    if _KEY in vars(engine):
        raise CaptureError(
            f"this {type(engine).__name__} is attached already; one engine has one checkpointer"
        )
    owners = [cls for cls in type(engine).__mro__ if "_take_model_step" in vars(cls)]
    install_hooks(owners[-1] if owners else None)
    binding = Binding(hooks)
    vars(engine)[_KEY] = binding
    return binding


def unbind(engine: Any) -> None:
    """The engine calls no hooks from here on; harmless when it has none."""
    vars(engine).pop(_KEY, None)


def binding_of(engine: Any) -> Binding | None:
    """The engine's binding, or None."""
    binding: Binding | None = vars(engine).get(_KEY)
    return binding


def forwards_of(engine: Any) -> int:
    """How many training forwards `engine` has begun since it was bound; 0 when it is not."""
    binding = binding_of(engine)
    return 0 if binding is None else binding.forwards


def on_new_engine(callback: Callable[[Any], None]) -> Callable[[], None]:
    """Call `callback` with every engine made from here on; returns how to stop that."""
    install_hooks()
    if callback not in _new_engine_callbacks:
        _new_engine_callbacks.append(callback)

    def stop() -> None:
        if callback in _new_engine_callbacks:
            _new_engine_callbacks.remove(callback)

    return stop


def _subclasses(cls: type) -> list[type]:
    found: list[type] = list(cls.__subclasses__())
    return found + [deeper for subclass in found for deeper in _subclasses(subclass)]


def _wrap(cls: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = vars(cls).get(name, getattr(cls, name))
    # functools.wraps copies the mark, so a wrap that somebody put around ours counts as ours.
    if getattr(original, _MARK, False):
        return
    wrapped = functools.wraps(original)(wrap(original))
    setattr(wrapped, _MARK, True)
    setattr(cls, name, wrapped)


def _wrap_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        state = vars(self)
        is_outermost = "_spotspeed_in_init" not in state
        state["_spotspeed_in_init"] = True
        try:
            original(self, *args, **kwargs)
        finally:
            # nn.Module.__init__ leaves other attributes alone; a failed __init__ may not.
            if is_outermost:
                state.pop("_spotspeed_in_init", None)
        if is_outermost:
            for callback in tuple(_new_engine_callbacks):
                callback(self)

    return __init__


def _wrap_update(original: Callable[..., Any]) -> Callable[..., Any]:
    def _take_model_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        binding = self.__dict__.get(_KEY)
        if binding is None:
            return original(self, *args, **kwargs)
        binding.hooks.before_update(self)
        result = original(self, *args, **kwargs)
        # Hooks that were unbound by `before_update`, or in the update, are not called again.
        if self.__dict__.get(_KEY) is binding:
            binding.hooks.after_update(self)
        return result

    return _take_model_step


def _wrap_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        binding = self.__dict__.get(_KEY)
        if binding is not None:
            binding.forwards += bool(getattr(getattr(self, "module", None), "training", True))
            if binding.watches_forward and not _runs_batches(self):
                binding.hooks.before_forward(self)
        return original(self, *args, **kwargs)

    return forward


def _wrap_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        binding = self.__dict__.get(_KEY)
        if binding is not None and binding.watches_forward:
            binding.hooks.before_forward(self)
        return original(self, *args, **kwargs)

    return batch


def _runs_batches(engine: Any) -> bool:
    """Whether the engine calls its own forward, from a method that all ranks call together."""
    return hasattr(type(engine), _BATCH_METHODS[0])


def _wrap_save(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        binding = self.__dict__.get(_KEY)
        if binding is not None:
            result = binding.hooks.on_save(self, _named(signature, self, args, kwargs))
            if result is not PASS:
                return result
        return original(self, *args, **kwargs)

    return save_checkpoint


def _wrap_load(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        binding = self.__dict__.get(_KEY)
        if binding is not None:
            named = _named(signature, self, args, kwargs)
            result = binding.hooks.on_load(self, named, lambda: original(self, *args, **kwargs))
            if result is not PASS:
                return result
        return original(self, *args, **kwargs)

    return load_checkpoint


def _named(
    signature: inspect.Signature, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The call's arguments by name without the engine; TypeError as the method would raise."""
    bound = signature.bind(engine, *args, **kwargs)
    bound.apply_defaults()
    named = dict(bound.arguments)
    named.pop(next(iter(signature.parameters)))
    return named


def _wrap_destroy(original: Callable[..., Any]) -> Callable[..., Any]:
    def destroy(self: Any, *args: Any, **kwargs: Any) -> Any:
        binding = self.__dict__.pop(_KEY, None)
        try:
            if binding is not None:
                binding.hooks.on_destroy(self)
        finally:
            result = original(self, *args, **kwargs)
        return result

    return destroy


_WRAPS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "__init__": _wrap_init,
    "_take_model_step": _wrap_update,
    "forward": _wrap_forward,
    "save_checkpoint": _wrap_save,
    "load_checkpoint": _wrap_load,
    "destroy": _wrap_destroy,
}
