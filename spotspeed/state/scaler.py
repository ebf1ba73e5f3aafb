"""The progress of loss scaling, wherever DeepSpeed keeps it.

Two places: DeepSpeed's own scaler (`loss_scaler` of ZeRO, `loss_scale_config` of the FP16
optimizers) and torch's GradScaler under torch_autocast. Only what a step changes is stored; what
the configuration fixes (windows, factors, a static scale) comes from the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PROGRESS = ("cur_iter",)
_DYNAMIC = ("cur_scale", "last_overflow_iter", "cur_hysteresis")
_SETTINGS = ("scale_window", "min_scale", "delayed_shift", "consecutive_hysteresis",
             "raise_error_at_min_scale", "scale_factor")  # fmt: skip


def capture(engine: Any) -> dict[str, Any]:
    """Both scalers as they are now; GradScaler's two numbers stay on their device."""
    scaler, grad_scaler = _scaler(engine), _grad_scaler(engine)
    found: dict[str, Any] = {"loss": None, "grad": None}
    if scaler is not None:
        fields = {name: getattr(scaler, name) for name in (*_PROGRESS, *_DYNAMIC)
                  if hasattr(scaler, name)}  # fmt: skip
        found["loss"] = {"is_dynamic": _is_dynamic(scaler), "fields": fields}
    if grad_scaler is not None:
        # The tensors are made by the first backward; before it the initial values stand for them.
        found["grad"] = (
            grad_scaler._init_scale if grad_scaler._scale is None
            else grad_scaler._scale.detach().clone(),
            grad_scaler._init_growth_tracker if grad_scaler._growth_tracker is None
            else grad_scaler._growth_tracker.detach().clone(),
        )  # fmt: skip
    return found


def describe(captured: Mapping[str, Any]) -> dict[str, Any]:
    """What `capture` found as plain data; reads device memory, so off the step's path."""
    described = {"loss": captured["loss"], "grad": None}
    if captured["grad"] is not None:
        scale, growth = captured["grad"]
        described["grad"] = {"scale": float(scale), "growth": int(growth)}
    return described


def settings(engine: Any) -> dict[str, Any] | None:
    """What the configuration fixes of a dynamic loss scale; None where it is not dynamic.

    Nobody restores it here; DeepSpeed's own files hold it beside the progress.
    """
    scaler = _scaler(engine)
    if scaler is None or not _is_dynamic(scaler):
        return None
    return {name: getattr(scaler, name) for name in _SETTINGS if hasattr(scaler, name)}


def apply(engine: Any, state: Mapping[str, Any]) -> list[str]:
    """Write the stored progress into the live scalers; returns what does not apply here."""
    notes: list[str] = []
    scaler, stored = _scaler(engine), state["loss"]
    if scaler is not None and stored is not None:
        is_dynamic = bool(stored["is_dynamic"]) and _is_dynamic(scaler)
        if stored["is_dynamic"] != _is_dynamic(scaler):
            notes.append("loss scale: dynamic in one of checkpoint and configuration, static in "
                         "the other; the configuration's was kept")  # fmt: skip
        for name in (*_PROGRESS, *(_DYNAMIC if is_dynamic else ())):
            if name in stored["fields"] and hasattr(scaler, name):
                setattr(scaler, name, stored["fields"][name])
    grad_scaler, stored = _grad_scaler(engine), state["grad"]
    if grad_scaler is not None and stored is not None:
        live = grad_scaler.state_dict()
        live.update({"scale": stored["scale"], "_growth_tracker": stored["growth"]})
        grad_scaler.load_state_dict(live)
    elif stored is not None:
        notes.append("the stored state of torch's GradScaler has no place in this configuration")
    return notes


def _scaler(engine: Any) -> Any:
    """The object with `cur_scale`, or None where nothing is scaled."""
    optimizer = engine.optimizer
    for found in (getattr(optimizer, "loss_scale_config", None),
                  getattr(optimizer, "loss_scaler", None)):  # fmt: skip
        if hasattr(found, "cur_scale"):
            return found
    return None


def _grad_scaler(engine: Any) -> Any:
    """torch's GradScaler of this engine if it is there and enabled, else None."""
    found = getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    if found is None:
        found = getattr(engine, "torch_autocast_z0_gradscaler", None)
    return found if found is not None and found.is_enabled() else None


def _is_dynamic(scaler: Any) -> bool:
    return bool(getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False)))
