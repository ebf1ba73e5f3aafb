"""Brings the powers of the betas that DeepSpeedCPUAdam hides in its operator to where they were.

From one step to the next the operator multiplies `beta ** step` by beta; where the step jumps, as
in the first one after a restore, it computes the power anew. The two differ in the last bit, and
with them every weight from there on. So the steps up to the restored one are counted through, on
one number that is thrown away: about two microseconds each.
"""

from __future__ import annotations

import math
from typing import Any

import torch

_GONE = 2.0**-26
"""A power so small that one less it, in fp32, is one: the operator uses nothing else of it."""


def count_through(optimizer: Any) -> None:
    """Make the operator of a restored DeepSpeedCPUAdam know the powers of an uninterrupted run.

    Of other optimizers there is nothing to do; nor where groups have several betas, or masters
    several step counts: the operator computes the powers anew in every step then.
    """
    if type(optimizer).__name__ != "DeepSpeedCPUAdam":
        return
    steps = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    betas = {tuple(float(beta) for beta in group["betas"]) for group in optimizer.param_groups}
    if len(steps) != 1 or len(betas) != 1:
        return
    (step,), ((first, second),) = steps, betas
    if step > _steps_until_gone(max(first, second)):
        return
    numbers = [torch.zeros(1) for _ in range(4)]
    for number in range(1, step + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, number, 0.0, first, second, 1.0, 0.0, True, *numbers
        )


def _steps_until_gone(beta: float) -> float:
    return math.log(_GONE) / math.log(beta) if 0.0 < beta < 1.0 else 0.0
