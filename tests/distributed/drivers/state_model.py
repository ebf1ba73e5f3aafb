"""A model and engines small enough to be built by the dozen, with every layout trap in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

GLOBAL_BATCH = 6
"""Samples per step, whatever the number of ranks."""


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

    def __init__(self, with_empty: bool) -> None:
        super().__init__()
        self.token = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 11)
        self.frozen = nn.Linear(11, 5)
        self.second = nn.Linear(5, 6)
        self.child = Child(with_empty)
        self.one = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.full((3,), 0.25))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.token.weight
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(self.token(tokens)))
        x = self.second(torch.tanh(self.frozen(x))) * self.one
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
    needs: str | None = None
    """The DeepSpeed operator that has to be built, if any."""


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
    ]  # fmt: skip


CASES: dict[str, Case] = {case.name: case for case in _cases()}


def build(case: Case, *, seed: int = 11) -> Any:
    """A fresh engine of `case`; another seed gives other initial weights."""
    get_accelerator().is_fp16_supported = lambda: True
    ranks = deepspeed.comm.get_world_size()
    torch.manual_seed(seed)
    model = Tiny(case.with_empty)
    config = {
        "train_batch_size": GLOBAL_BATCH, "train_micro_batch_size_per_gpu": GLOBAL_BATCH // ranks,
        "gradient_clipping": 1.0, "steps_per_print": 10**9, **case.config,
    }  # fmt: skip
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=_optimizer(case, model), config=config
    )
    return engine


def _optimizer(case: Case, model: Tiny) -> Any:
    decayed = [model.token.weight, model.first.weight, model.frozen.weight, model.second.weight]
    others = [model.first.bias, model.second.bias, model.frozen.bias, *model.child.parameters(),
              model.unused]  # fmt: skip
    groups: list[dict[str, Any]] = [
        {"params": decayed, "lr": 2e-2, "weight_decay": 0.1},
        {"params": others, "lr": 1e-2, "weight_decay": 0.0},
        {"params": [model.one], "lr": 3e-2, "weight_decay": 0.0},
    ]
    if not case.is_grouped:
        groups = [{"params": [parameter for group in groups for parameter in group["params"]]}]
    match case.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
        case "adagrad":
            return torch.optim.Adagrad(groups, lr=1e-2)
        case "cpuadam":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups)
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
        tokens = torch.randint(0, 7, (GLOBAL_BATCH,), generator=generator)
        share = GLOBAL_BATCH // ranks
        loss = engine(tokens[rank * share : (rank + 1) * share])
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        deepspeed.comm.all_reduce(total)
        losses.append(float(total) / ranks)
    return losses
