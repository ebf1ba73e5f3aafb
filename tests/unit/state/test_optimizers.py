"""The table of optimizers, held against the optimizers themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spotspeed.core.interval import Interval
from spotspeed.errors import CaptureError, InvalidLayoutError, UnsupportedLayoutError
from spotspeed.state.optimizers import (
    Rule,
    ScalarTarget,
    empty_like,
    rule_for,
    split_state,
    store_scalar,
)
from spotspeed.state.partition import Slot

SETUPS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"amsgrad": True, "fused": True}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.RMSprop, {}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
]


def _stepped(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> Any:
    parameter = torch.nn.Parameter(torch.arange(5.0))
    optimizer = kind([parameter], **options)
    for _ in range(2):
        parameter.grad = torch.ones(5)
        optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize(("kind", "options"), SETUPS)
def test_the_table_says_what_torchs_optimizer_keeps(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    parameter, optimizer = _stepped(kind, options)
    rule, state = rule_for(optimizer, optimizer.param_groups[0]), optimizer.state[parameter]
    elementwise, scalars = split_state(state, rule, parameter, "x")
    assert set(elementwise) == set(rule.elementwise)
    assert set(scalars) == set(rule.scalars)
    assert all(tensor.shape == (5,) for tensor in elementwise.values())
    assert all(tensor.shape == (1,) for tensor in scalars.values())


@pytest.mark.parametrize(("kind", "options"), SETUPS)
def test_state_made_for_a_fresh_optimizer_continues_like_its_own(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    parameter, optimizer = _stepped(kind, options)
    rule = rule_for(optimizer, optimizer.param_groups[0])
    values, numbers = split_state(optimizer.state[parameter], rule, parameter, "x")
    twin = torch.nn.Parameter(parameter.detach().clone())
    other = kind([twin], **options)
    state = other.state[twin]
    for key, tensor in values.items():
        state[key] = empty_like(twin, other, ())
        state[key].copy_(tensor)
    for key, number in numbers.items():
        store_scalar(state, key, number.clone(), rule, ScalarTarget.of(twin, other.param_groups[0]))
    for key, value in optimizer.state[parameter].items():
        assert state[key].dtype == value.dtype and state[key].shape == value.shape
        assert state[key].device == value.device
    for tensor, stepper in ((parameter, optimizer), (twin, other)):
        tensor.grad = torch.full((5,), 0.5)
        stepper.step()
    assert torch.equal(parameter, twin)


@pytest.mark.parametrize("is_contiguous", [True, False])
def test_what_no_parameter_fills_of_new_state_is_zero(
    is_contiguous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dirty(like: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.full_like(like, 7.0, **options)

    monkeypatch.setattr(torch, "empty_like", dirty)
    master = torch.zeros(12) if is_contiguous else torch.zeros(3, 4).t()
    slots = [Slot("b", (3,), Interval(0, 3), 6), Slot("a", (9,), Interval(2, 6), 1)]
    made = empty_like(master, torch.optim.Adam([torch.nn.Parameter(master)]), slots)
    expected = [0, 7, 7, 7, 7, 0, 7, 7, 7, 0, 0, 0] if is_contiguous else [0] * 12
    assert made.flatten().tolist() == expected


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.ASGD])
def test_an_optimizer_that_is_not_in_the_table_is_refused_by_name(kind: Any) -> None:
    optimizer = kind([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(UnsupportedLayoutError, match=f"{kind.__name__}.*supported are.*AdamW"):
        rule_for(optimizer, optimizer.param_groups[0])


def test_a_subclass_of_a_known_optimizer_is_not_taken_for_it() -> None:
    class AdamW(torch.optim.AdamW):
        pass

    optimizer = AdamW([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(UnsupportedLayoutError, match="AdamW: its state is not known"):
        rule_for(optimizer, optimizer.param_groups[0])


@pytest.mark.parametrize(
    "state",
    [
        {"exp_avg": torch.zeros(3)},
        {"history": [1, 2]},
        {"step": torch.zeros(2)},
        {"step": "three"},
        {"buffer": torch.zeros(5)},
    ],
    ids=["shape", "list", "vector", "text", "key"],
)
def test_state_that_does_not_fit_the_table_is_named(state: dict[str, Any]) -> None:
    rule = Rule(("exp_avg",), ("step",))
    with pytest.raises(CaptureError, match=f"^{next(iter(state))}:layer.weight: "):
        split_state(state, rule, torch.zeros(5), "layer.weight")


def test_offload_buffers_and_absent_values_are_not_state() -> None:
    state = {"exp_avg": None, "exp_avg_offload_buffer": torch.zeros(5)}
    assert split_state(state, Rule(("exp_avg",)), torch.zeros(5), "x") == ({}, {})


@pytest.mark.parametrize(
    ("value", "dtype"), [(True, torch.bool), (3, torch.int64), (0.5, torch.float64)]
)
def test_python_numbers_are_stored_in_a_dtype_that_holds_them(
    value: object, dtype: torch.dtype
) -> None:
    _, scalars = split_state({"step": value}, Rule((), ("step",)), torch.zeros(5), "x")
    assert scalars["step"].dtype == dtype and scalars["step"].tolist() == [value]


def test_a_scalar_takes_the_type_of_the_optimizer_that_gets_it() -> None:
    target = ScalarTarget(torch.float32, torch.device("cpu"))
    numbers, tensors = Rule((), ("step",), scalars_are_numbers=True), Rule((), ("step",))
    state: dict[str, Any] = {}
    store_scalar(state, "step", torch.tensor([7.0]), numbers, target)
    assert state == {"step": 7} and type(state["step"]) is int
    state = {}
    store_scalar(state, "step", torch.tensor([7]), tensors, target)
    assert state["step"].shape == () and state["step"].dtype == torch.float32
    present = torch.tensor(1.0)
    state = {"step": present}
    store_scalar(state, "step", torch.tensor([9]), tensors, target)
    assert state["step"] is present and present.item() == 9


@pytest.mark.parametrize("value", [torch.tensor([2.5]), torch.tensor([2**24 + 1])])
def test_a_scalar_that_would_be_rounded_is_refused(value: torch.Tensor) -> None:
    is_float = value.is_floating_point()
    rule = Rule((), ("step",), scalars_are_numbers=is_float)
    target = ScalarTarget(torch.float32, torch.device("cpu"))
    with pytest.raises(InvalidLayoutError, match="step: the stored value"):
        store_scalar({}, "step", value, rule, target)
