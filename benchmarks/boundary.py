"""What the step boundary costs: medians of the hooks and of keeping the small state, in µs.

    python benchmarks/boundary.py [--rounds N]

One process, real DeepSpeed engines on the CPU. Prints one JSON document: for each model the parts
of `SmallState.record` and the whole, and what the class hooks add to a forward and to an update
when nothing is pending. Budget: under 100 µs for a model without large buffers.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch


def median_us(call: Callable[[], Any], rounds: int) -> float:
    """Median time of one call, after a tenth of the rounds as warm-up."""
    times = []
    for number in range(rounds + rounds // 10):
        began = time.perf_counter_ns()
        call()
        if number >= rounds // 10:
            times.append(time.perf_counter_ns() - began)
    return round(statistics.median(times) / 1e3, 2)


def plain_model() -> torch.nn.Module:
    """Twelve blocks without buffers."""
    layers = [torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16))
              for _ in range(12)]  # fmt: skip
    return torch.nn.Sequential(*layers)


def normalised_model() -> torch.nn.Module:
    """Fifty batch norms: 150 small buffers, as a ResNet-50 has."""
    return torch.nn.Sequential(*[torch.nn.BatchNorm1d(16) for _ in range(50)])


def masked_model() -> torch.nn.Module:
    """One buffer of 16 MiB: the copy itself is what costs."""
    model = plain_model()
    model.register_buffer("mask", torch.ones(4096, 4096, dtype=torch.bool), persistent=False)
    return model


def make_engine(model: torch.nn.Module, stage: int) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}, "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
        "zero_optimization": {"stage": stage},
    }  # fmt: skip
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def measure(model: torch.nn.Module, stage: int, rounds: int) -> dict[str, float]:
    from spotspeed.state import boundary, counters, groups, rng, scaler, schedule
    from spotspeed.state.provider import provider_for
    from spotspeed.state.small import SmallState

    engine = make_engine(model, stage)
    small = SmallState(engine, provider_for(engine).group_names)
    copied = small._buffers.copy(None)
    found = {
        "record": median_us(small.record, rounds),
        "record.rng": median_us(rng.capture, rounds),
        "record.groups": median_us(lambda: groups.capture(small._optimizer), rounds),
        "record.schedule": median_us(lambda: schedule.capture(engine), rounds),
        "record.scaler": median_us(lambda: scaler.capture(engine), rounds),
        "record.counters": median_us(lambda: counters.capture(engine), rounds),
        "record.buffers": median_us(lambda: small._buffers.copy(copied), rounds),
        "snapshot": median_us(lambda: small.snapshot(engine.global_steps), rounds),
    }
    found.update(measure_hooks(engine, rounds))
    boundary.unbind(engine)
    engine.destroy()
    return found


def measure_hooks(engine: Any, rounds: int) -> dict[str, float]:
    """What the wraps add, measured on a class whose methods do nothing."""
    from spotspeed.state import boundary

    class Bare:
        def __init__(self) -> None:
            """Nothing to make."""

        def forward(self, batch: Any) -> None:
            """Nothing to compute."""

        _take_model_step = save_checkpoint = load_checkpoint = destroy = forward

    class Hooks:
        def before_update(self, engine: Any) -> None:
            """Nothing to wait for."""

        after_update = before_forward = on_destroy = before_update

    def cost(call: Callable[[], Any]) -> float:
        def many() -> None:
            for _ in range(100):
                call()

        return median_us(many, max(rounds // 10, 20)) / 100

    bare = Bare()
    before = cost(lambda: bare.forward(None))
    boundary.install_hooks(Bare)
    unbound = cost(lambda: bare.forward(None))
    boundary.bind(bare, Hooks())  # type: ignore[arg-type]
    return {
        "hooks.forward_of_other_engines": round(unbound - before, 3),
        "hooks.forward": round(cost(lambda: bare.forward(None)) - before, 3),
        "hooks.update": round(cost(lambda: bare._take_model_step(None)) - before, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    rounds = parser.parse_args().rounds
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    logging.disable(logging.WARNING)
    models = {"plain": plain_model, "normalised": normalised_model, "masked": masked_model}
    results = {
        f"{name}, stage {stage}": measure(make(), stage, rounds if name != "masked" else 50)
        for name, make in models.items()
        for stage in (2, 3)
    }
    sys.stdout.write(json.dumps({"unit": "us", "median of": rounds, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
