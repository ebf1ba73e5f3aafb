"""Put a state dict into an engine's module as DeepSpeed's own `load_checkpoint` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from spotspeed.state.piece import dtype_name
from spotspeed.state.probe import has_optimizer

_REFRESH = ("_restore_from_bit16_weights", "refresh_fp32_params")
"""What DeepSpeed's optimizers make their masters by, from weights that were replaced."""
CustomLoad = Callable[..., Any]
"""DeepSpeed's `custom_load_fn(src=state_dict, dst=module)`."""


def live_dtypes(engine: Any) -> dict[str, str]:
    """The dtype of each parameter and buffer of the module, by the name it has there."""
    module = engine.module
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    return {name: dtype_name(tensor) for name, tensor in named}


def put_module(
    engine: Any, state: Mapping[str, torch.Tensor], *,
    is_strict: bool = True, custom: CustomLoad | None = None,
) -> None:  # fmt: skip
    """Load `state` into the module, by `custom` where it is given.

    Collective in ZeRO stage 3, where the parameters are gathered meanwhile and what rank 0 has made
    of them is kept. Raises what `custom` or `torch.nn.Module.load_state_dict` do.
    """
    _call(engine, "checkpoint_event_prologue", "partition_all_parameters")
    engine.load_module_state_dict(
        {"module": dict(state)}, strict=is_strict, custom_load_fn=custom,
        fetch_z3_params=engine.zero_optimization_stage() == 3,
    )  # fmt: skip
    _call(engine, "checkpoint_event_epilogue")


def weights_of(engine: Any) -> list[torch.Tensor]:
    """A copy of what this rank holds of the weights."""
    return [_held(parameter).detach().clone() for parameter in engine.module.parameters()]


def differ(engine: Any, before: list[torch.Tensor]) -> bool:
    """Whether this rank holds other weights than `before`, bit for bit."""
    now = [_held(parameter).detach() for parameter in engine.module.parameters()]
    return any(not _is_same(one, other) for one, other in zip(now, before, strict=True))


def follow_weights(engine: Any) -> None:
    """Make the masters, where the optimizer has any, what the module's weights are."""
    if has_optimizer(engine):
        _call(engine, *_REFRESH)


def _call(engine: Any, *names: str) -> None:
    """Call the first of these methods that the optimizer has, before or after a load in stage 3."""
    for name in names:
        if callable(method := getattr(engine.optimizer, name, None)):
            method()
            return


def _held(parameter: Any) -> torch.Tensor:
    shard: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
    return parameter if shard is None else shard


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """By bytes: the padding of a shard may be NaN."""
    return torch.equal(one.contiguous().view(-1).view(torch.uint8),
                       other.contiguous().view(-1).view(torch.uint8))  # fmt: skip
