"""Groups are found by names, scales keep their progress, buffers their memory, chance its place."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig, LossScaler
from deepspeed.runtime.lr_schedules import OneCycle, WarmupLR

from spotspeed.errors import FormatError, InvalidLayoutError
from spotspeed.state import groups, rng, scaler, schedule
from spotspeed.state.buffers import Buffers


def optimizer(*group_settings, **defaults):
    made = [{"params": [torch.nn.Parameter(torch.zeros(1))], **s} for s in group_settings]
    return torch.optim.AdamW(made, lr=0.1, **defaults)


def describe(*names, **changes):
    source = optimizer(*[{"lr": 0.1 * (i + 1), "weight_decay": i / 10, **changes}
                         for i in range(len(names))])  # fmt: skip
    return groups.describe(groups.capture(source), names)


def test_groups_are_matched_by_names_in_any_order_and_split():
    stored = describe(["a", "b"], ["c"])
    live = optimizer({}, {}, {}, {})
    live.param_groups[3]["lr"] = 5.0
    groups.apply(live, groups.plan(stored, [["c"], ["b"], ["a"], []]))
    assert [group["lr"] for group in live.param_groups] == [0.2, 0.1, 0.1, 5.0]
    assert [group["weight_decay"] for group in live.param_groups] == [0.1, 0.0, 0.0, 0.01]


def test_groups_that_were_split_can_be_one_again_if_they_agree():
    stored = describe(["a"], ["b"])
    stored[1]["settings"] = dict(stored[0]["settings"])
    assert groups.plan(stored, [["b", "a"]]) == [stored[0]["settings"]]
    stored[1]["settings"]["lr"] = 7.0
    with pytest.raises(InvalidLayoutError, match="groups 0 and 1, which differ in lr"):
        groups.plan(stored, [["b", "a"]])


def test_the_groups_of_another_pipeline_stage_go_by_index():
    stored = describe(["stage0.a"], ["stage0.b"])
    planned = groups.plan(stored, [["stage1.a"], ["stage1.b"]])
    assert planned == [stored[0]["settings"], stored[1]["settings"]]


def test_a_group_that_is_known_in_part_is_refused():
    with pytest.raises(InvalidLayoutError, match=r"\['new'\] is in no stored group"):
        groups.plan(describe(["a"]), [["a", "new"]])
    with pytest.raises(InvalidLayoutError, match="param_group 1"):
        groups.plan(describe(["a"]), [["a"], ["new"]])
    with pytest.raises(FormatError):
        groups.plan([{"names": ["a"]}], [["a"]])


def test_how_to_compute_stays_the_live_optimizers_business():
    stored = describe(["a"], foreach=True, betas=(0.5, 0.6))
    live = optimizer({"foreach": False})
    groups.apply(live, groups.plan(stored, [["a"]]))
    assert live.param_groups[0]["foreach"] is False
    assert live.param_groups[0]["betas"] == (0.5, 0.6)
    assert "params" not in stored[0]["settings"] and "foreach" not in stored[0]["settings"]


def test_rates_that_are_tensors_are_filled_in_place_and_captured_by_value():
    rate = torch.tensor(0.25)
    source = optimizer({})
    source.param_groups[0]["lr"] = rate
    captured = groups.capture(source)
    rate.fill_(9.0)
    stored = groups.describe(captured, [["a"]])
    live = optimizer({}, {})
    target = torch.tensor(0.0)
    live.param_groups[0]["lr"] = target
    groups.apply(live, groups.plan(stored, [["a"], ["a"]]))
    assert live.param_groups[0]["lr"] is target and target.item() == 0.25
    assert live.param_groups[1]["lr"] == 0.25 and type(live.param_groups[1]["lr"]) is float


def test_what_is_not_plain_in_a_group_is_left_out():
    source = optimizer({})
    source.param_groups[0]["process_group"] = object()
    assert "process_group" not in groups.describe(groups.capture(source), [["a"]])[0]["settings"]


def dynamic_scaler():
    return DynamicLossScaler(2.0**16, 100, 1.0, 2, False, dtype=torch.half)


def config(*, is_dynamic=True, dtype=torch.float16):
    return LossScaleConfig(dtype, is_dynamic, 128.0, None)


@pytest.mark.parametrize(
    ("attribute", "make"), [("loss_scaler", dynamic_scaler), ("loss_scale_config", config)]
)
def test_a_dynamic_scale_keeps_its_progress(attribute, make):
    live = make()
    live.cur_scale, live.cur_iter, live.last_overflow_iter = 512.0, 9, 7
    if attribute == "loss_scaler":
        live.cur_hysteresis = 1
    engine = SimpleNamespace(optimizer=SimpleNamespace(**{attribute: live}))
    captured = scaler.capture(engine)
    live.cur_scale = 1.0
    fresh = make()
    again = SimpleNamespace(optimizer=SimpleNamespace(**{attribute: fresh}))
    assert scaler.apply(again, scaler.describe(captured)) == []
    assert (fresh.cur_scale, fresh.cur_iter, fresh.last_overflow_iter) == (512.0, 9, 7)
    assert getattr(fresh, "cur_hysteresis", 1) == 1


def test_a_static_scale_of_the_configuration_is_kept_and_said_so():
    dynamic = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=dynamic_scaler()))
    static = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=LossScaler(64.0)))
    (note,) = scaler.apply(static, scaler.describe(scaler.capture(dynamic)))
    assert "the configuration's was kept" in note
    assert static.optimizer.loss_scaler.cur_scale == 64.0
    (note,) = scaler.apply(dynamic, scaler.describe(scaler.capture(static)))
    assert dynamic.optimizer.loss_scaler.cur_scale == 2.0**16


@pytest.mark.parametrize("is_used", [True, False], ids=["after a backward", "before one"])
def test_torchs_grad_scaler_is_stored_although_deepspeed_does_not(is_used):
    live = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    engine = SimpleNamespace(optimizer=SimpleNamespace(torch_autocast_gradscaler=live))
    parameter = torch.nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([parameter], lr=0.1)
    for _ in range(2 if is_used else 0):
        live.scale(parameter.sum()).backward()
        live.step(sgd)
        live.update()
    captured = scaler.capture(engine)
    fresh = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=3)
    fresh.scale(parameter.sum())
    again = SimpleNamespace(optimizer=object(), torch_autocast_z0_gradscaler=fresh)
    assert scaler.apply(again, scaler.describe(captured)) == []
    assert fresh.state_dict() == live.state_dict()
    assert fresh._get_growth_tracker() == (2 if is_used else 0)


def test_deepspeeds_schedules_continue_where_they_were():
    def make(lr):
        live = optimizer({"lr": lr})
        return SimpleNamespace(optimizer=live, lr_scheduler=WarmupLR(live, warmup_num_steps=10))

    engine, again = make(0.1), make(0.1)
    for _ in range(4):
        engine.lr_scheduler.step()
    captured, settings = schedule.capture(engine), groups.capture(engine.optimizer)
    engine.lr_scheduler.step()
    assert schedule.apply(again, captured) == []
    groups.apply(again.optimizer, settings)
    schedule.show_rates(again, again.optimizer)
    assert again.lr_scheduler.get_last_lr() == [settings[0]["lr"]]
    again.lr_scheduler.step()
    assert again.optimizer.param_groups[0]["lr"] == engine.optimizer.param_groups[0]["lr"]


def test_momentum_that_a_schedule_cycles_is_part_of_the_groups():
    live = optimizer({})
    engine = SimpleNamespace(
        optimizer=live, lr_scheduler=OneCycle(live, cycle_min_lr=0.1, cycle_max_lr=0.5)
    )
    for _ in range(3):
        engine.lr_scheduler.step()
    assert groups.capture(live)[0]["betas"] == live.param_groups[0]["betas"] != (0.9, 0.999)


def test_what_a_schedule_changes_in_place_is_captured_by_value():
    class Odd:
        def __init__(self):
            self.state = {"list": [1], "milestones": Counter({3: 1}), "tensor": torch.zeros(1),
                          "function": lambda: 0}  # fmt: skip

        def state_dict(self):
            return self.state

    engine = SimpleNamespace(lr_scheduler=Odd())
    captured = schedule.capture(engine)["lr_scheduler"]["state"]
    for value in ("list", "milestones"):
        engine.lr_scheduler.state[value].clear()
    engine.lr_scheduler.state["tensor"] += 1
    assert captured == {"list": [1], "milestones": Counter({3: 1}), "tensor": torch.zeros(1)}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("a", torch.zeros(2))
        self.inner = torch.nn.BatchNorm1d(2)
        self.alias = self.inner
        self.register_buffer("same", self.a)


def test_every_buffer_is_copied_once_under_its_first_name():
    net = Net()
    copied = Buffers(net).copy(None)
    assert copied.names == tuple(name for name, _ in net.named_buffers())


def test_memory_is_used_again_only_while_the_buffers_are_the_same_kind():
    net = Net()
    buffers = Buffers(net)
    first, second = buffers.copy(None), buffers.copy(None)
    net.a += 5
    assert buffers.copy(first) is first and first.tensors[0].tolist() == [5, 5]
    net.a = torch.ones(2, dtype=torch.float64)
    third = buffers.copy(second)
    assert third is not second and third.tensors[0].dtype is torch.float64
    again = buffers.copy(first)
    assert again is not first and again.tensors[0].dtype is torch.float64
    net.a.resize_(3).fill_(2)
    assert buffers.copy(again).tensors[0].tolist() == [2, 2, 2]


def test_buffers_that_appear_or_vanish_are_noticed():
    net = Net()
    buffers = Buffers(net)
    first = buffers.copy(None)
    net.inner.register_buffer("new", torch.ones(1))
    assert "inner.new" in buffers.copy(first).names
    del net.inner.new
    net.a = None
    assert buffers.copy(first).names == (
        "same", "inner.running_mean", "inner.running_var", "inner.num_batches_tracked",
    )  # fmt: skip


def test_the_activation_checkpointing_trackers_states_are_restored():
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    try:
        tracker.add("model-parallel", 5)
        state = rng.capture().to_dict()
        with tracker.fork("model-parallel"):
            first = torch.rand(2)
        assert rng.restore(state, spare_seed=b"") == []
        with tracker.fork("model-parallel"):
            assert torch.equal(torch.rand(2), first)
        rng.reseed(rng.seed_of(1, 2, 3))
        with tracker.fork("model-parallel"):
            reseeded = torch.rand(2)
        assert not torch.equal(reseeded, first)
        rng.reseed(rng.seed_of(1, 2, 3))
        with tracker.fork("model-parallel"):
            assert torch.equal(torch.rand(2), reseeded)
    finally:
        tracker.reset()


def test_half_a_gaussian_pair_is_part_of_the_state():
    np.random.seed(1)
    np.random.randn(), random.gauss(0, 1)
    state = rng.capture().to_dict()
    expected = np.random.randn(), random.gauss(0, 1)
    np.random.randn(3), random.random()
    rng.restore(state, spare_seed=b"")
    assert (np.random.randn(), random.gauss(0, 1)) == expected
