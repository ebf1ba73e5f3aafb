"""Loads of markers for the weights' sake: `custom_load_fn`, and engines without an optimizer."""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
from engines import RANK, WORLD_SIZE, Net, make, raises, train

import spotspeed
from spotspeed.errors import SpotSpeedError

FOLDER = Path(sys.argv[1])
BF16 = {"bf16": {"enabled": True}}
CASES = {"z1": (1, {}), "z1-bf16": (1, BF16), "z3-bf16": (3, BF16), "z0": (0, {})}


def weights(engine):
    """Whole parameters on every rank."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        is_sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_sharded):
            found[name] = parameter.detach().float().clone()
    return found


def is_same(one, other, tolerance=0.0):
    return all(torch.allclose(one[name], other[name], rtol=0, atol=tolerance) for name in one)


def infer(stage, changes):
    torch.manual_seed(9)
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
        "spotspeed": {"path": str(FOLDER / "inference")}, **changes,
    }  # fmt: skip
    return deepspeed.initialize(model=Net(), config=config)[0]


def plain(src, dst):
    dst.load_state_dict(src)


def shifted(src, dst):
    """As for a model that names or scales its weights otherwise."""
    with torch.no_grad():
        for name, parameter in dst.named_parameters():
            if parameter.numel():
                parameter.copy_(src[name].to(parameter.dtype) + 1)


def check_a_custom_function_gets_the_module(name, saved, expected, after):
    stage, changes = CASES[name]
    engine = make(stage, FOLDER / f"{name}-plain", attached=False, seed=2, **changes)
    path, client_state = engine.load_checkpoint(saved, custom_load_fn=plain)
    assert path.endswith("spotspeed.json") and client_state == {"x": 1}
    assert engine.global_steps == 3 and is_same(expected, weights(engine))
    assert train(engine, 2) == after, "the exact masters, as the function has changed nothing"
    engine.destroy()


def check_masters_follow_what_it_changes(name, saved, expected):
    stage, changes = CASES[name]
    wanted = {key: value + 1 for key, value in expected.items()}
    for number, flags in enumerate(({}, {"load_optimizer_states": False})):
        path = FOLDER / f"{name}-shifted-{number}"
        engine = make(stage, path, attached=False, seed=3, **changes)
        engine.load_checkpoint(saved, custom_load_fn=shifted, **flags)
        assert is_same(wanted, weights(engine), 0.02)
        train(engine, 1)
        assert is_same(wanted, weights(engine), 0.05), "one update from there"
        engine.destroy()


def check_an_error_of_the_function_is_everybodys(name, saved):
    engine = make(CASES[name][0], FOLDER / f"{name}-odd", attached=False, **CASES[name][1])

    def odd(src, dst):
        if RANK == WORLD_SIZE - 1:
            raise KeyError("no such weight")

    error = raises((SpotSpeedError, KeyError), lambda: engine.load_checkpoint(
        saved, custom_load_fn=odd))  # fmt: skip
    assert "no such weight" in str(error)
    engine.destroy()


def check_an_engine_without_an_optimizer_gets_the_weights(name, saved, expected):
    for stage in (0, 3):
        engine = infer(stage, CASES[name][1])
        _, client_state = engine.load_checkpoint(saved)
        assert client_state == {"x": 1} and engine.global_steps == 3
        assert is_same(expected, weights(engine)), stage
        other = infer(stage, CASES[name][1])
        other.load_checkpoint(saved, load_module_only=True, load_optimizer_states=False)
        assert other.global_steps == 0 and is_same(expected, weights(other))
        assert engine.load_checkpoint(FOLDER / "nowhere") == (None, None)
    assert not (FOLDER / "inference").exists(), "nothing is claimed in order to load"


def main():
    spotspeed.install()
    for name, (stage, changes) in CASES.items():
        if name not in sys.argv[2:]:
            continue
        saved = FOLDER / f"{name}-out"
        engine = make(stage, FOLDER / name, attached=False, **changes)
        train(engine, 3)
        engine.save_checkpoint(saved, client_state={"x": 1})
        expected, after = weights(engine), train(engine, 2)
        engine.destroy()
        check_a_custom_function_gets_the_module(name, saved, expected, after)
        check_masters_follow_what_it_changes(name, saved, expected)
        if stage < 3:  # There the function runs between collectives of DeepSpeed's.
            check_an_error_of_the_function_is_everybodys(name, saved)
        check_an_engine_without_an_optimizer_gets_the_weights(name, saved, expected)
        print(f"rank {RANK}: {name}: held", flush=True)


if __name__ == "__main__":
    main()
