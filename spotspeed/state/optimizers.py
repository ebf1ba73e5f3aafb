"""What each supported optimizer keeps beside a master tensor, and in which Python type.

A state key is *elementwise* (one number per element of the master) or a *scalar* (one for the
whole master, such as "step"). torch keeps scalars as 0-dim tensors, DeepSpeed's own optimizers as
Python ints; their lazily initialised state is all there or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from spotspeed.errors import CaptureError, InvalidLayoutError, UnsupportedLayoutError
from spotspeed.state import huge_pages
from spotspeed.state.partition import Slot
from spotspeed.state.piece import flat_elements

OFFLOAD_SUFFIX = "_offload_buffer"
"""Host copies that `engine.offload_states()` adds to the state; they are not state."""


@dataclass(frozen=True, slots=True)
class Rule:
    """The state of one optimizer class under one param_group's hyper-parameters."""

    elementwise: tuple[str, ...]
    scalars: tuple[str, ...] = ()
    scalars_are_numbers: bool = False
    is_eager: bool = False
    """Whether the state exists from construction on, instead of from the first step."""

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self.elementwise + self.scalars)


def _adam(hyper: Mapping[str, Any]) -> Rule:
    extra = ("max_exp_avg_sq",) if hyper.get("amsgrad") else ()
    return Rule(("exp_avg", "exp_avg_sq", *extra), ("step",))


def _sgd(hyper: Mapping[str, Any]) -> Rule:
    return Rule(("momentum_buffer",) if hyper.get("momentum") else ())


def _rmsprop(hyper: Mapping[str, Any]) -> Rule:
    momentum = ("momentum_buffer",) if hyper.get("momentum") else ()
    centered = ("grad_avg",) if hyper.get("centered") else ()
    return Rule(("square_avg", *momentum, *centered), ("step",))


def _always(*elementwise: str, scalars: tuple[str, ...] = ("step",), **flags: bool) -> Any:
    rule = Rule(elementwise, scalars, **flags)
    return lambda hyper: rule


_TORCH: dict[str, Callable[[Mapping[str, Any]], Rule]] = {
    "Adam": _adam,
    "AdamW": _adam,
    "Adagrad": _always("sum", is_eager=True),
    "Adadelta": _always("square_avg", "acc_delta"),
    "Adamax": _always("exp_avg", "exp_inf"),
    "Muon": _always("momentum_buffer", scalars=()),
    "NAdam": _always("exp_avg", "exp_avg_sq", scalars=("step", "mu_product")),
    "RAdam": _always("exp_avg", "exp_avg_sq"),
    "RMSprop": _rmsprop,
    "SGD": _sgd,
}
_DEEPSPEED: dict[str, Callable[[Mapping[str, Any]], Rule]] = {
    "DeepSpeedCPUAdam": _always("exp_avg", "exp_avg_sq", scalars_are_numbers=True),
    "DeepSpeedCPUAdagrad": _always("exp_avg_sq", scalars_are_numbers=True),
    "DeepSpeedCPULion": _always("exp_avg", "exp_avg_sq", scalars_are_numbers=True),
    "FusedAdam": _always("exp_avg", "exp_avg_sq", scalars_are_numbers=True),
    "FusedLamb": _always("exp_avg", "exp_avg_sq", scalars_are_numbers=True),
    "FusedLion": _always("exp_avg", scalars_are_numbers=True),
}


def rule_for(optimizer: Any, hyper: Mapping[str, Any]) -> Rule:
    """The rule of an optimizer's class; raises UnsupportedLayoutError for an unknown class."""
    kind = type(optimizer)
    if kind.__name__ == "MuonWithAuxAdam":
        return _muon(optimizer, hyper)
    table = {"torch": _TORCH, "deepspeed": _DEEPSPEED}.get(kind.__module__.split(".")[0], {})
    if kind.__name__ not in table:
        raise UnsupportedLayoutError(
            f"optimizer {kind.__module__}.{kind.__qualname__}: its state is not known; supported "
            f"are torch.optim {', '.join(_TORCH)} and DeepSpeed's {', '.join(_DEEPSPEED)}"
        )
    return table[kind.__name__](hyper)


def _muon(optimizer: Any, hyper: Mapping[str, Any]) -> Rule:
    """DeepSpeed's Muon: momentum for matrices, another optimizer's state for the other groups."""
    if hyper.get("use_muon"):
        return Rule(("momentum_buffer",))
    if optimizer.aux_optimizer is not None:
        return rule_for(optimizer.aux_optimizer, hyper)
    return Rule(("exp_avg", "exp_avg_sq"), ("step",), scalars_are_numbers=True)


def split_state(
    state: Mapping[str, Any],
    rule: Rule,
    master: torch.Tensor,
    owner: str,
    own_shapes: Mapping[str, torch.Size] = MappingProxyType({}),
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The live state of one master as (elementwise, scalars), both as 1-D tensors.

    `owner` names the master in errors; `own_shapes` are those of keys that are not shaped like it.
    Raises CaptureError for a key that the rule does not have, or a value that does not fit it.
    """
    elementwise: dict[str, torch.Tensor] = {}
    scalars: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if value is None or str(key).endswith(OFFLOAD_SUFFIX):
            continue
        shape = own_shapes.get(key, master.shape)
        if key in rule.elementwise and torch.is_tensor(value) and value.shape == shape:
            elementwise[key] = flat_elements(value)
        elif key in rule.scalars:
            scalars[key] = _scalar(value, f"{key}:{owner}")
        else:
            raise CaptureError(
                f"{key}:{owner}: the optimizer's state holds {_describe(value)}; only "
                f"{', '.join(rule.elementwise)} of shape {tuple(shape)} and the numbers "
                f"{', '.join(rule.scalars) or '(none)'} are known for it"
            )
    return elementwise, scalars


def state_dtype(master: torch.Tensor, optimizer: Any) -> torch.dtype:
    """The dtype in which the optimizer makes elementwise state for a master in its first step."""
    is_own = type(optimizer).__name__ in _DEEPSPEED
    is_fp32 = is_own and getattr(optimizer, "fp32_optimizer_states", False)
    return torch.float32 if is_fp32 else master.dtype


def empty_like(master: torch.Tensor, optimizer: Any, slots: Iterable[Slot]) -> torch.Tensor:
    """Elementwise state as the optimizer would make it in its first step, but for its contents.

    Zero is only what lies in none of `slots`, which are to be filled: to touch all of it once more
    takes about as long as to read it.
    """
    made = torch.empty_like(master.detach(), dtype=state_dtype(master, optimizer))
    huge_pages.ask(made)
    if not made.is_contiguous():
        return made.zero_()
    flat, end = made.view(-1), 0
    for slot in sorted(slots, key=lambda slot: slot.offset):
        flat[end : slot.offset].zero_()
        end = max(end, slot.offset + slot.interval.count)
    flat[end:].zero_()
    return made


def forget(optimizer: Any, key: torch.Tensor, hyper: Mapping[str, Any]) -> None:
    """Leave the optimizer with the state of a master that was never stepped."""
    if not rule_for(optimizer, hyper).is_eager:
        optimizer.state.pop(key, None)
        return
    for name, value in optimizer.state[key].items():  # Adagrad's, which a step expects to find.
        value.fill_(0 if name == "step" else hyper.get("initial_accumulator_value", 0))


def store_scalar(
    state: dict[str, Any], key: str, value: torch.Tensor, rule: Rule, target: ScalarTarget
) -> None:
    """Write one restored scalar in the type that the optimizer keeps it in.

    `value` is a 1-element tensor of the stored dtype. Raises InvalidLayoutError when the live
    type cannot hold the number exactly.
    """
    number = value.item()
    present = state.get(key)
    if torch.is_tensor(present):
        present.copy_(value.reshape(present.shape))
        held = present.item()
    elif present is not None or rule.scalars_are_numbers:
        state[key] = held = type(present if present is not None else 0)(number)
    else:
        state[key] = torch.tensor(number, dtype=target.dtype, device=target.device)
        held = state[key].item()
    if held != number:
        raise InvalidLayoutError(
            f"{key}: the stored value {number!r} becomes {held!r} in this optimizer's own type"
        )


@dataclass(frozen=True, slots=True)
class ScalarTarget:
    """Dtype and device of a scalar that torch would keep as a 0-dim tensor."""

    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, master: torch.Tensor, hyper: Mapping[str, Any]) -> ScalarTarget:
        """As torch.optim chooses: on the host unless the step itself runs on the device."""
        is_fused = bool(hyper.get("fused"))
        on_device = is_fused or bool(hyper.get("capturable"))
        is_double = torch.get_default_dtype() is torch.float64 and not is_fused
        return cls(
            torch.float64 if is_double else torch.float32,
            master.device if on_device else torch.device("cpu"),
        )


def _scalar(value: object, what: str) -> torch.Tensor:
    if torch.is_tensor(value) and value.numel() == 1:
        return flat_elements(value)
    for kind, dtype in ((bool, torch.bool), (int, torch.int64), (float, torch.float64)):
        if isinstance(value, kind):
            return torch.tensor([value], dtype=dtype)
    raise CaptureError(f"{what}: the optimizer keeps {_describe(value)}, expected one number")


def _describe(value: object) -> str:
    if torch.is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return f"{type(value).__name__} {value!r}"[:120]
