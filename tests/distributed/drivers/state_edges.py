"""The rare ways a state can be: each check writes "ok" or what was wrong: `state_edges.py OUT`.

Every rank checks; the first complaint of any rank is what is written.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed import comm
from deepspeed.compile.passes import offload_adam_states as deepcompile
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.utils import safe_get_full_optimizer_state
from state_model import CASES, FULL_CASES, Case, Tiny, _zero, build, train
from state_snapshot import Snapshot, fill, restore, snapshot, stored_tensors

from spotspeed.core.layout import TensorKey
from spotspeed.errors import (
    CaptureError,
    InvalidLayoutError,
    SpotSpeedError,
    UnsupportedLayoutError,
)
from spotspeed.state.provider import provider_for
from spotspeed.state.spreading import spread

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def trained(name: str, steps: int = 2, seed: int = 11) -> tuple[Any, Any]:
    engine = build(CASES[name], seed=seed)
    train(engine, steps)
    return engine, provider_for(engine)


def same(before: Snapshot, after: Snapshot) -> None:
    assert set(before.tensors) == set(after.tensors), set(before.tensors) ^ set(after.tensors)
    for key, values in before.tensors.items():
        assert torch.equal(values, after.tensors[key]), key


def refused(kind: type[SpotSpeedError], words: str, action: Callable[[], object]) -> None:
    try:
        action()
    except kind as error:
        assert words in str(error), f"{words!r} is not in {error}"
        return
    raise AssertionError(f"no {kind.__name__} about {words!r}")


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The weights that a forward pass would use on this rank."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return found


@check
def a_parameter_without_optimizer_state_keeps_having_none() -> None:
    engine, provider = trained("s0-fp32")
    unused = engine.module.unused
    del engine.optimizer.state[unused]
    state = snapshot(provider)
    assert "exp_avg:unused" not in state.tensors
    other, target = trained("s0-fp32", seed=5)
    assert other.optimizer.state[other.module.unused]
    restore(target, state)
    assert not other.optimizer.state.get(other.module.unused)
    same(state, snapshot(target))
    _, zero = trained("z2-fp32", seed=5)
    restore(zero, state)
    after = snapshot(zero)
    assert not after.tensors["exp_avg:unused"].any() and after.tensors["step:unused"].item() == 2


@check
def a_parameter_that_was_frozen_later_keeps_its_optimizer_state() -> None:
    engine, provider = trained("s0-fp32")
    engine.module.first.weight.requires_grad_(False)
    state = snapshot(provider)
    assert "exp_avg:first.weight" in state.tensors and "fp32:first.weight" in state.tensors
    _, target = trained("s0-fp32", 1, seed=5)
    restore(target, state)
    same(state, snapshot(target))


@check
def a_parameter_may_be_frozen_on_one_side_and_trained_on_the_other() -> None:
    """Without ZeRO a script freezes and thaws as it goes, and is built as it begins."""
    for name in ("s0-fp32", "s0-sgd", "s0-plain-sgd", "s0-adagrad"):
        engine = build(FULL_CASES[name])
        train(engine, 2)
        state = snapshot(provider_for(engine))
        other = build(FULL_CASES[name], seed=5)
        other.module.first.weight.requires_grad_(False)
        target = provider_for(other)
        restore(target, state)
        same(state, snapshot(target))
        other.module.first.weight.requires_grad_(True)
        other.global_steps = 2
        assert train(other, 2) == train(engine, 2), name
    for name in ("s0-fp32", "s0-plain-sgd", "s0-adagrad"):
        engine = build(FULL_CASES[name])
        for step in range(2):  # Never stepped, or without a trace of it.
            thawed = name == "s0-plain-sgd" and step == 0
            engine.module.first.weight.requires_grad_(thawed)
            train(engine, 1)
        state = snapshot(provider_for(engine))
        assert "weight:first.weight" in state.tensors
        other = build(FULL_CASES[name], seed=5)
        train(other, 2)
        restore(provider_for(other), state)
        for one in (engine, other):
            one.module.first.weight.requires_grad_(True)
        assert train(other, 2) == train(engine, 2), name


@check
def weights_that_are_not_the_cast_master_come_back() -> None:
    for name in ("z2-rr", "z1-bf16", "z2-bf16", "z2-host", "bf16opt", "z3-bf16", "s0-bf16"):
        engine, provider = trained(name)
        with torch.no_grad():
            for parameter in (engine.module.first.weight, engine.module.second.bias):
                target = getattr(parameter, "ds_tensor", parameter)
                target.view(-1)[0] += 0.5
        before = snapshot(provider)
        if hasattr(engine.optimizer, "checkpoint_event_epilogue"):
            engine.optimizer.checkpoint_event_prologue()
            engine.optimizer.checkpoint_event_epilogue()
        expected = full_weights(engine)
        assert any(key.startswith("weight:first.weight@elements-") for key in before.tensors), name
        other = build(CASES[name], seed=5)
        fresh = provider_for(other)
        restore(fresh, before)
        same(before, snapshot(fresh))
        for key, weight in full_weights(other).items():
            assert torch.equal(weight, expected[key]), f"{name}: {key}"


@check
def all_ranks_use_the_restored_weights() -> None:
    """Also frozen and persistent ones, which ZeRO-3 keeps gathered."""
    for name in CASES:
        if CASES[name].needs is not None:
            continue
        engine, provider = trained(name)
        expected, state = full_weights(engine), snapshot(provider)
        other, target = trained(name, 1, seed=5)
        for parameter in other.module.frozen.parameters():
            values = getattr(parameter, "ds_tensor", parameter)
            values.data.add_(1.0)
        restore(target, state)
        for key, weight in full_weights(other).items():
            assert torch.equal(weight, expected[key]), f"{name}: {key}"


@check
def a_restore_rebinds_no_tensor_of_deepspeed() -> None:
    for name in ("z2-bf16", "z3-bf16", "bf16opt", "s0-bf16", "z3-host"):
        engine, provider = trained(name)
        state = snapshot(provider)
        before = [piece.tensor.data_ptr() for piece in provider.pieces()
                  if piece.fragment.shape or "fp32" in piece.fragment.key.kind]  # fmt: skip
        train(engine, 1)
        restore(provider, state)
        after = [piece.tensor.data_ptr() for piece in provider.pieces()
                 if piece.fragment.shape or "fp32" in piece.fragment.key.kind]  # fmt: skip
        assert before == after, name


@check
def deepspeeds_accessors_see_the_restored_state() -> None:
    for name in ("z2-bf16", "bf16opt", "z3-bf16"):
        _, provider = trained(name)
        state = snapshot(provider)
        other = build(CASES[name], seed=5)
        restore(provider_for(other), state)
        for key, parameter in other.module.named_parameters():
            if f"exp_avg:{key}" in state.tensors:
                value = safe_get_full_optimizer_state(parameter, "exp_avg")
                assert torch.equal(value.flatten(), state.tensors[f"exp_avg:{key}"]), (name, key)


@check
def two_step_counts_do_not_fit_one_flat_partition() -> None:
    _, provider = trained("s0-fp32")
    state = snapshot(provider)
    for key in ("step:first.weight", "step:first.bias"):
        state.tensors[key] = torch.tensor([7.0])
    target = provider_for(build(CASES["z2-fp32"]))
    fill(target.prepare_restore(stored_tensors(state)), state)
    refused(InvalidLayoutError, "one optimizer state (zero2)", target.check_restore)


@check
def another_model_is_refused_with_the_parameters_that_differ() -> None:
    _, provider = trained("z2-bf16")
    state = stored_tensors(snapshot(provider))
    master = TensorKey("fp32", "first.weight")
    for name in ("z2-bf16", "z3-bf16", "s0-bf16"):
        prepare = provider_for(build(CASES[name])).prepare_restore
        for key, words in (
            ("first.weight", "first.weight: here with shape (11, 6), not in the checkpoint"),
            ("frozen.bias", "frozen.bias: here with shape (5,), not in the checkpoint"),
        ):
            less = {item: value for item, value in state.items() if item.name != key}
            refused(InvalidLayoutError, words, partial(prepare, less))
        other = {**state, master: replace(state[master], shape=(12, 6))}
        words = "first.weight: stored shape (12, 6), here (11, 6)"
        refused(InvalidLayoutError, words, partial(prepare, other))
        more = {**state, TensorKey("fp32", "extra"): state[master]}
        words = "extra: stored with shape (11, 6), not in this model"
        refused(InvalidLayoutError, words, partial(prepare, more))
        frozen = {
            TensorKey("fp32", item.name) if item.name == "frozen.bias" else item: value
            for item, value in state.items()
        }
        words = "frozen.bias: stored as trainable, here it is not"
        refused(InvalidLayoutError, words, partial(prepare, frozen))


@check
def the_size_of_a_save_is_known_before_the_first_step() -> None:
    for name, case in CASES.items():
        if case.needs is None:
            engine = build(case)
            provider = provider_for(engine)
            before = provider.expected_bytes()
            train(engine, 1)
            while int(engine.skipped_steps) == int(engine.global_steps):
                train(engine, 1)  # A step that overflows makes no state.
            written = sum(piece.share.fragment.size_bytes for piece in provider.pieces())
            slack = 16 * len(provider.pieces())
            assert before == provider.expected_bytes(), name
            assert written <= before <= written + slack, (name, written, before)


@check
def a_refused_state_changes_nothing() -> None:
    _, provider = trained("z2-sgd")
    state = stored_tensors(snapshot(provider))
    for name in ("z2-bf16", "z3-bf16"):
        _, target = trained(name)
        before = snapshot(target)
        action = partial(target.prepare_restore, state)
        refused(InvalidLayoutError, "is not that of AdamW", action)
        same(before, snapshot(target))


@check
def an_optimizer_state_that_is_not_known_is_named() -> None:
    engine, provider = trained("z2-bf16")
    master = engine.optimizer.single_partition_of_fp32_groups[0]
    engine.optimizer.optimizer.state[master]["history"] = [1, 2]
    refused(CaptureError, "history:", provider.pieces)


@check
def what_is_not_supported_is_refused_by_name() -> None:
    def engine(config: dict[str, Any], **arguments: Any) -> Any:
        return deepspeed.initialize(
            model=Tiny(False), config={"train_micro_batch_size_per_gpu": 1, **config}, **arguments
        )[0]

    setups: list[tuple[str, Callable[[], Any]]] = [
        ("without an optimizer", lambda: engine(_zero(3))),
        ("without an optimizer", lambda: engine(_zero(0))),
        ("torch.optim.lbfgs.LBFGS", lambda: engine(
            _zero(0), optimizer=lambda group: torch.optim.LBFGS(list(group)))),
    ]  # fmt: skip
    for words, make in setups:
        refused(UnsupportedLayoutError, words, partial(provider_for, make()))


@check
def state_that_is_elsewhere_or_moves_is_neither_described_nor_filled() -> None:
    engine, provider = trained("z3-bf16")
    state, expected = snapshot(provider), len(provider.pieces())
    # As engine.offload_states() leaves it, which needs FusedAdam and so a GPU.
    engine.optimizer.offloaded_states.add(OffloadStateTypeEnum.hp_params)
    words = "call engine.reload_states() "
    refused(CaptureError, words, provider.pieces)
    refused(CaptureError, words, provider.derived_mismatches)
    stored = stored_tensors(state)
    refused(UnsupportedLayoutError, words, partial(provider.prepare_restore, stored))
    engine.optimizer.offloaded_states.clear()
    assert len(provider.pieces()) == expected
    deepcompile.optimizer = engine.optimizer  # As engine.compile(schedule=...) leaves it.
    try:
        refused(CaptureError, "move_opt_states", provider.pieces)
    finally:
        deepcompile.optimizer = None
    assert len(provider.pieces()) == expected
    same(state, snapshot(provider))


@check
def secondary_shards_of_hpz_do_not_outlive_a_restore() -> None:
    case = CASES["z3-bf16"]
    settings = {**case.config["zero_optimization"], "zero_hpz_partition_size": 2,
                "stage3_param_persistence_threshold": 0}  # fmt: skip
    secondary: Case = replace(case, config={**case.config, "zero_optimization": settings})
    engine = build(secondary)
    train(engine, 2)
    state, expected = snapshot(provider_for(engine)), full_weights(engine)
    other = build(secondary, seed=5)
    train(other, 1)
    other.module.eval()
    with torch.no_grad():
        other(torch.tensor([1, 2, 3]))
    target = provider_for(other)
    restore(target, state)
    other.global_steps = 2
    for key, weight in full_weights(other).items():
        assert torch.equal(weight, expected[key]), key
    other.module.train()
    assert train(other, 2) == train(engine, 2)


def partitions(size: int, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(what each rank has to begin with, what each is to have), in one flat tensor."""
    ranks, own = comm.get_world_size(), comm.get_rank()
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randn(ranks * size, generator=generator).bfloat16().split(size)
    flat = torch.zeros(ranks * size, dtype=torch.bfloat16)
    begun = [flat.narrow(0, rank * size, size) for rank in range(ranks)]
    begun[own].copy_(expected[own])
    return begun, list(expected)


@check
def partitions_reach_the_other_ranks_through_memory() -> None:
    group = comm.get_world_group()
    cases = [partitions(size, seed) for seed, size in enumerate((1000, 1, 333, 64))]
    found = [begun for begun, _ in cases]
    assert spread(found, [group] * len(found), window_bytes=256, least_bytes=1)
    for begun, expected in cases:
        for own, wanted in zip(begun, expected, strict=True):
            assert torch.equal(own, wanted)
    assert not spread(found, [group] * len(found)), "so little is left to the collective"


@check
def all_ranks_fall_back_where_one_has_no_memory_to_share() -> None:
    def cannot(*_: Any, **__: Any) -> int:
        raise OSError("there is none")

    begun, _ = partitions(1000, 1)
    for call in ("memfd_create", "pwrite", "open"):
        with mock.patch.object(os, call, cannot if comm.get_rank() == 1 else getattr(os, call)):
            assert not spread([begun], [comm.get_world_group()], least_bytes=1), call


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:] or list(CHECKS)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo")
    gc.freeze()  # ZeRO-3 collects garbage as it starts; what is imported is none.
    results = {}
    for name in names:
        try:
            CHECKS[name]()
            verdict = "ok"
        except AssertionError as error:
            verdict = f"rank {comm.get_rank()}: {error}"
        verdicts: list[Any] = [None] * comm.get_world_size()
        torch.distributed.all_gather_object(verdicts, verdict)
        results[name] = next((item for item in verdicts if item != "ok"), "ok")
    if comm.get_rank() == 0:
        out.write_text(json.dumps(results))
    comm.barrier()


if __name__ == "__main__":
    main()
