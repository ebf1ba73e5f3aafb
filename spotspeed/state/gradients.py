"""Forgets the gradients that micro-steps have accumulated since the last update.

A loaded state is that of a boundary, where none are: those of the state before would join the first
update after the load.
"""

from __future__ import annotations

from typing import Any

import torch


def forget(engine: Any) -> None:
    """As DeepSpeed does when an update has overflowed (its `step` of each optimizer); local."""
    for parameter in engine.module.parameters():
        parameter.grad = None
    optimizer = engine.optimizer
    zero_grad = getattr(optimizer, "zero_grad", None)
    if zero_grad is None or isinstance(optimizer, torch.optim.Optimizer):
        return  # A bare one has the parameters alone; FusedAdam's method takes no argument.
    zero_grad(set_to_none=True)
    # ZeRO keeps what it has reduced beside the parameters.
    for gathered in ("averaged_gradients", "all_grad_tensors"):
        found = getattr(optimizer, gathered, None)
        if isinstance(found, dict):
            found.update(dict.fromkeys(found))
    if hasattr(optimizer, "accumulated_grads_in_cpu"):  # ZeRO 1 and 2: the next one overwrites.
        optimizer.micro_step_id = -1
    if getattr(optimizer, "cpu_offload", False) and hasattr(optimizer, "reset_cpu_buffers"):
        optimizer.reset_cpu_buffers()
