"""Accumulated gradients are forgotten whatever optimizer an engine has."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from spotspeed.state import gradients


class Narrow(torch.optim.SGD):
    """As DeepSpeed's FusedAdam, whose `zero_grad` takes no argument."""

    def zero_grad(self) -> None:  # type: ignore[override]
        raise AssertionError("the parameters are all that a bare optimizer has")


def test_a_bare_optimizer_is_not_asked_for_more_than_the_parameters() -> None:
    module = torch.nn.Linear(2, 2)
    module(torch.ones(1, 2)).sum().backward()
    gradients.forget(SimpleNamespace(module=module, optimizer=Narrow(module.parameters(), lr=0.1)))
    assert all(parameter.grad is None for parameter in module.parameters())
