"""A model and engines small enough to be built by the dozen, with every layout trap in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

GLOBAL_BATCH = 12
"""Samples per step, whatever the number of ranks (1 to 4)."""


class Child(nn.Module):
    """Holds what ZeRO-3 does not accept on the root module."""

    def __init__(self, with_empty: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.5]))
        if with_empty:
            self.empty = nn.Parameter(torch.empty(0, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain


class Tiny(nn.Module):
    """Tied, frozen, unused, 1-element and (where DeepSpeed allows it) empty parameters."""

    def __init__(self, with_empty: bool, *, frozen_rows: int = 0, has_norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, affine=False) if has_norm else None
        self.token = nn.Embedding(7, 6)
        self.base = nn.Linear(6, frozen_rows, bias=False) if frozen_rows else None
        self.first = nn.Linear(6, 11)
        self.frozen = nn.Linear(11, 5)
        self.second = nn.Linear(5, 6)
        self.child = Child(with_empty)
        self.one = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.full((3,), 0.25))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.token.weight
        for module in (self.frozen, self.base):
            for parameter in () if module is None else module.parameters():
                parameter.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens)
        if self.base is not None:
            x = x + self.base(x).mean(-1, keepdim=True)
        x = torch.tanh(self.first(x))
        x = self.second(torch.tanh(self.frozen(x))) * self.one
        if self.norm is not None:  # Its statistics only, which ranks have of their own samples.
            self.norm(x.detach())
        logits = self.head(self.child(x)).float()
        return nn.functional.cross_entropy(logits, (tokens + 1) % 7)


@dataclass(frozen=True, slots=True)
class Case:
    """One way to train: the DeepSpeed config, and the optimizer that is handed to it."""

    name: str
    config: dict[str, Any]
    optimizer: str = "adamw"
    is_grouped: bool = True
    with_empty: bool = True
    frozen_rows: int = 0
    """Rows of 6 of a frozen weight: 5000 of them are 99 % of the model."""
    needs: str | None = None
    """The DeepSpeed operator that has to be built, if any."""
    accumulation: int = 1
    """Micro batches of a step, each of GLOBAL_BATCH samples on all ranks together."""
    has_small: bool = False
    """Whether BatchNorm, schedule and scale are kept and restored as well."""
    sequence: int = 1
    """Ranks that share a sequence (Ulysses), where the number of ranks divides by it."""


def _zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {
        "zero_optimization": {
            "stage": stage, "reduce_bucket_size": 4000, "allgather_bucket_size": 4000,
            "stage3_prefetch_bucket_size": 1000, **settings,
        },
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip


BF16 = {"bf16": {"enabled": True}}
BF16_MASTER = {
    "bf16": {
        "enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True,
    }
}  # fmt: skip
FP16 = {"fp16": {"enabled": True, "loss_scale": 64}}
DYNAMIC = {"fp16": {"enabled": True, "initial_scale_power": 17, "loss_scale_window": 2,
                    "hysteresis": 1}}  # fmt: skip
WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20,
                                                       "warmup_max_lr": 0.03}}}  # fmt: skip
SMALL3 = {"sub_group_size": 40, "stage3_param_persistence_threshold": 8}
HOST = {"device": "cpu"}


def _cases() -> list[Case]:
    three = {"with_empty": False}
    return [
        Case("s0-fp32", _zero(0)),
        Case("s0-sgd", _zero(0), "sgd"),
        Case("s0-adagrad", _zero(0), "adagrad", is_grouped=False),
        Case("s0-bf16", {**_zero(0), **BF16}),
        Case("s0-fp16", {**_zero(0), **FP16}),
        Case("s0-fused", {**_zero(0), **BF16}, "fused", needs="fused_adam"),
        Case("z1-fp32", _zero(1)),
        Case("z1-bf16", {**_zero(1), **BF16, "data_types": {"grad_accum_dtype": "bf16"}}),
        Case("bf16opt", {**_zero(1), **BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
        Case("z2-fp32", _zero(2)),
        Case("z2-bf16", {**_zero(2), **BF16}),
        Case("z2-fp16", {**_zero(2), **FP16}),
        Case("z2-rr", _zero(2, round_robin_gradients=True)),
        Case("z2-rr-aligned", _zero(2, round_robin_gradients=True, parameter_alignment=True)),
        Case("z2-amsgrad", {**_zero(2), **BF16}, "amsgrad"),
        Case("z2-sgd", {**_zero(2), **BF16}, "sgd"),
        Case("z2-adagrad", {**_zero(2), **BF16}, "adagrad", is_grouped=False),
        Case("z2-host", {**_zero(2, offload_optimizer=HOST), **BF16}),
        Case("z2-master16", {**_zero(2), **BF16_MASTER}),
        Case("z3-master16", {**_zero(3, **SMALL3), **BF16_MASTER}, **three),
        Case("z2-cpuadam", {**_zero(2, offload_optimizer=HOST), **BF16}, "cpuadam",
             needs="cpu_adam"),
        Case("z3-fp32", _zero(3, **SMALL3), **three),
        Case("z3-bf16", {**_zero(3, **SMALL3), **BF16}, **three),
        Case("z3-fp16", {**_zero(3), **FP16}, **three),
        Case("z3-sgd", {**_zero(3, **SMALL3), **BF16}, "sgd", **three),
        Case("z3-adagrad", {**_zero(3, **SMALL3), **BF16}, "adagrad", is_grouped=False, **three),
        Case("z3-host", {**_zero(3, offload_optimizer=HOST, offload_param=HOST, **SMALL3), **BF16},
             **three),
        Case("z3-cpuadam", {**_zero(3, offload_optimizer=HOST, **SMALL3), **BF16}, "cpuadam",
             needs="cpu_adam", **three),
        Case("s0-small", {**_zero(0), **DYNAMIC}, accumulation=2, has_small=True),
        Case("z2-small", {**_zero(2), **DYNAMIC}, accumulation=2, has_small=True),
        Case("z3-small", {**_zero(3, **SMALL3), **DYNAMIC, **WARMUP}, accumulation=2,
             has_small=True, **three),
    ]  # fmt: skip


def _full_cases() -> list[Case]:
    """What only the full matrix trains."""
    three = {"with_empty": False}
    host3 = _zero(3, offload_optimizer=HOST, offload_param=HOST, **SMALL3)
    host1 = _zero(1, offload_optimizer=HOST)
    host2 = _zero(2, offload_optimizer=HOST)
    return [
        Case("s0-plain-sgd", _zero(0), "plain-sgd"),
        Case("z1-host", {**host1, **BF16}),
        Case("z1-cpuadam", {**host1, **BF16}, "cpuadam", needs="cpu_adam"),
        Case("z2-host-rr", {**_zero(2, offload_optimizer=HOST, round_robin_gradients=True)}),
        Case("z3-host-cpuadam", {**host3, **BF16}, "cpuadam", needs="cpu_adam", **three),
        Case("z2-cpulion", {**host2, **BF16}, "cpulion", needs="cpu_lion"),
        Case("z3-cpulion", {**host3, **BF16}, "cpulion", needs="cpu_lion", **three),
        Case("z2-cpuadagrad", {**host2, **BF16}, "cpuadagrad", needs="cpu_adagrad",
             is_grouped=False),
        Case("z3-cpuadagrad", {**host3, **BF16}, "cpuadagrad", needs="cpu_adagrad",
             is_grouped=False, **three),
        Case("z1-rr", {**_zero(1, round_robin_gradients=True), **BF16}),
        *_muon_cases(),
        *_mesh_cases(),
        Case("z2-lora", {**_zero(2), **BF16}, frozen_rows=5000),
        Case("z3-lora", {**_zero(3, **SMALL3), **BF16}, frozen_rows=5000, **three),
    ]  # fmt: skip


def _mesh_cases() -> list[Case]:
    """Ranks in groups: sequences shared by two (Ulysses), and secondary shards (hpZ)."""
    three = {"with_empty": False}
    secondary = _zero(3, **{**SMALL3, "stage3_param_persistence_threshold": 0},
                      zero_hpz_partition_size=2)  # fmt: skip
    return [
        Case("z3-ulysses", {**_zero(3, **SMALL3), **BF16}, sequence=2, **three),
        Case("z3-hpz", {**secondary, **BF16}, **three),
    ]


def _muon_cases() -> list[Case]:
    """Muon for the matrices that DeepSpeed chooses; it refuses reduce_scatter and empty groups."""
    whole = {"reduce_scatter": False}
    three = {"with_empty": False}
    return [
        Case("s0-muon", {**_zero(0)}, "muon", **three),
        Case("z1-muon", {**_zero(1, **whole), **BF16, "data_types": {"grad_accum_dtype": "bf16"}},
             "muon", **three),
        Case("muon-bf16opt", {**_zero(1, **whole), **BF16,
                              "data_types": {"grad_accum_dtype": "fp32"}}, "muon", **three),
        Case("z2-muon", {**_zero(2, **whole), **BF16}, "muon", **three),
        Case("z2-muon-fp32", _zero(2, **whole), "muon", **three),
        Case("z2-muon-rr", {**_zero(2, **whole, round_robin_gradients=True), **BF16},
             "muon", **three),
        Case("z2-muon-host", {**_zero(2, **whole, offload_optimizer=HOST), **BF16},
             "muon", **three),
        Case("z3-muon", {**_zero(3, **whole, **SMALL3), **BF16}, "muon", **three),
        Case("z3-muon-host", {**_zero(3, **whole, **SMALL3, offload_optimizer=HOST), **BF16},
             "muon", **three),
    ]  # fmt: skip


CASES: dict[str, Case] = {case.name: case for case in _cases()}
FULL_CASES: dict[str, Case] = CASES | {case.name: case for case in _full_cases()}


def build(case: Case, *, seed: int = 11, rate: float = 1.0) -> Any:
    """A fresh engine of `case`; another seed gives other initial weights, `rate` other rates."""
    get_accelerator().is_fp16_supported = lambda: True
    ranks = deepspeed.comm.get_world_size()
    torch.manual_seed(seed)
    model = Tiny(case.with_empty, frozen_rows=case.frozen_rows, has_norm=case.has_small)
    shared = case.sequence if ranks % case.sequence == 0 else 1
    micro = GLOBAL_BATCH * shared // ranks
    config = {
        "train_batch_size": GLOBAL_BATCH * case.accumulation,
        "train_micro_batch_size_per_gpu": micro, "gradient_clipping": 1.0,
        "steps_per_print": 10**9, **case.config,
    }  # fmt: skip
    if shared > 1:  # ZeRO-3 parses the config again, and does not know then who shares.
        config["gradient_accumulation_steps"] = config.pop("train_batch_size") // GLOBAL_BATCH
    if "zero_hpz_partition_size" in config["zero_optimization"] and ranks % 2:
        zero = {**config["zero_optimization"], "zero_hpz_partition_size": ranks}
        config["zero_optimization"] = zero
    optimizer, groups = _optimizer(case, model), None
    if case.optimizer == "muon":
        config |= {"optimizer": {"type": "Muon", "params": {"lr": 1e-2, "torch_adam": True}}}
        groups = _groups(model)
    for group in () if optimizer is None else optimizer.param_groups:
        group["lr"] *= rate
    schedule = None
    if case.has_small and "scheduler" not in config:
        schedule = partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step))
    engine, _, _, _ = deepspeed.initialize(
        model=model, lr_scheduler=schedule, optimizer=optimizer, model_parameters=groups,
        config=config,
        mesh_param=(ranks // shared, shared) if shared > 1 else None,
    )  # fmt: skip
    return engine


def _groups(model: Tiny) -> list[dict[str, Any]]:
    decayed = [model.token.weight, model.first.weight, model.frozen.weight, model.second.weight]
    others = [model.first.bias, model.second.bias, model.frozen.bias, *model.child.parameters(),
              model.unused]  # fmt: skip
    return [
        {"params": decayed, "lr": 2e-2, "weight_decay": 0.1},
        {"params": others, "lr": 1e-2, "weight_decay": 0.0},
        {"params": [model.one], "lr": 3e-2, "weight_decay": 0.0},
    ]


def _optimizer(case: Case, model: Tiny) -> Any:
    groups = _groups(model)
    if not case.is_grouped:
        groups = [{"params": [parameter for group in groups for parameter in group["params"]]}]
    match case.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
        case "plain-sgd":
            return torch.optim.SGD(groups, lr=1e-2)
        case "adagrad":
            return torch.optim.Adagrad(groups, lr=1e-2)
        case "cpuadam":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups)
        case "muon":
            return None
        case "cpulion":
            from deepspeed.ops.lion import DeepSpeedCPULion

            return DeepSpeedCPULion(groups)
        case "cpuadagrad":
            from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad

            return DeepSpeedCPUAdagrad(groups)
        case "fused":
            from deepspeed.ops.adam import FusedAdam

            return FusedAdam(groups)
    return torch.optim.AdamW(groups, amsgrad=case.optimizer == "amsgrad")


def train(engine: Any, steps: int) -> list[float]:
    """Run so many steps from `engine.global_steps` on; the mean losses, equal on all ranks."""
    losses = []
    rank, ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    for _ in range(steps):
        generator = torch.Generator().manual_seed(1000 + engine.global_steps)
        total = torch.zeros(1)
        for _ in range(engine.gradient_accumulation_steps()):
            tokens = torch.randint(0, 7, (GLOBAL_BATCH,), generator=generator)
            share = GLOBAL_BATCH // ranks
            loss = engine(tokens[rank * share : (rank + 1) * share])
            engine.backward(loss)
            engine.step()
            total += loss.detach().float()
        deepspeed.comm.all_reduce(total)
        losses.append(float(total) / ranks)
    return losses
