"""Engines whose model is divided among the ranks: pipelines of two stages, experts on two ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

GLOBAL_BATCH, MICRO_BATCH, SEQUENCE = 8, 2, 4
"""Samples per step, per forward of a pipeline, and tokens of a sequence where AutoTP divides."""
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 14, "loss_scale_window": 2,
                 "hysteresis": 1}}  # fmt: skip
INTO_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
INTO_BF16 = {"data_types": {"grad_accum_dtype": "bf16"}}


@dataclass(frozen=True, slots=True)
class Case:
    """One way to train a divided model; `degree` is the number of stages, or of expert ranks."""

    make: Callable[[Case, str], Any]
    stage: int
    config: dict[str, Any]
    degree: int = 2
    has_extra_group: bool = False
    """Whether the last stage has a param_group that the others lack."""


class Block(nn.Module):
    """Dropout, a running mean that each rank keeps by itself, and frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.frozen, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.register_buffer("running", torch.zeros(6))
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.frozen(self.linear(x)))
        mean = hidden.detach().reshape(-1, 6).mean(0).to(self.running.dtype)
        self.running.mul_(0.9).add_(mean, alpha=0.1)
        hidden = self.norm(hidden - self.running.to(x.dtype))
        return x + nn.functional.dropout(hidden, 0.1, self.training)


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain


def _unembed(embedding: nn.Embedding, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, embedding.weight)


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.float(), labels)


def _pipeline(case: Case, path: str) -> Any:
    embed = partial(TiedLayerSpec, "embed", nn.Embedding, 7, 6)
    layers = [embed(), LayerSpec(Block), LayerSpec(Block), LayerSpec(Block), LayerSpec(Last),
              embed(forward_fn=_unembed)]  # fmt: skip
    module = PipelineModule(layers, num_stages=case.degree, loss_fn=_loss,
                            partition_method="uniform")  # fmt: skip
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    extra = [p for n, p in trained if n.endswith("gain") and case.has_extra_group]
    flat = [p for n, p in trained if p.dim() == 1 and not any(p is other for other in extra)]
    groups = [
        {"params": extra, "lr": 5e-2},
        {"params": [p for _, p in trained if p.dim() == 2], "lr": 2e-2, "weight_decay": 0.1},
        {"params": flat, "lr": 1e-2},
    ]
    return _engine(case, path, module, groups, micro_batch=MICRO_BATCH,
                   replicas=comm.get_world_size() // case.degree)  # fmt: skip


class Mixture(nn.Module):
    """Two MoE layers, dense layers around them, a frozen parameter in every expert."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(7, 6), nn.Linear(6, 7)
        expert = Block()
        self.moes = nn.ModuleList(
            MoE(6, expert, num_experts=4, ep_size=degree, k=1, capacity_factor=4.0, min_capacity=1)
            for _ in range(2)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, extra = self.token(tokens), 0.0
        for moe in self.moes:
            out, auxiliary, _ = moe(x)
            x, extra = x + out, extra + auxiliary
        return _loss(self.head(x), (tokens + 1) % 7) + 0.01 * extra


def _mixture(case: Case, path: str) -> Any:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    module = Mixture(case.degree)
    for name, parameter in module.named_parameters():
        if "deepspeed_experts" in name and parameter.requires_grad:
            # DeepSpeed starts the experts of all ranks alike; distinct ones tell them apart.
            rank = comm.get_rank() % case.degree
            parameter.data += 0.01 * rank * torch.randn(parameter.shape)
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = split_params_into_different_moe_groups_for_optimizer([
        {"params": [p for p in trained if p.dim() > 1], "lr": 2e-2, "weight_decay": 0.1,
         "name": "matrices"},
        {"params": [p for p in trained if p.dim() == 1], "lr": 1e-2, "name": "vectors"},
    ])  # fmt: skip
    replicas = comm.get_world_size()
    return _engine(case, path, module, groups, micro_batch=GLOBAL_BATCH // replicas,
                   replicas=replicas)  # fmt: skip


def _engine(
    case: Case, path: str, module: nn.Module, groups: list[Any], *, micro_batch: int, replicas: int
) -> Any:
    config = {
        "train_batch_size": GLOBAL_BATCH, "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": GLOBAL_BATCH // micro_batch // replicas,
        "zero_optimization": {"stage": case.stage, "reduce_bucket_size": 4000},
        "steps_per_print": 10**9, "spotspeed": {"path": path, "interval": {"seconds": None}},
        **case.config,
    }  # fmt: skip
    if case.stage:
        config |= {"zero_allow_untested_optimizer": True}
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return deepspeed.initialize(
        model=module, optimizer=optimizer, lr_scheduler=schedule, config=config
    )[0]


def _tensor_parallel(case: Case, path: str) -> Any:
    """A model whose linear layers AutoTP divides; it replaces them, so the optimizer comes last."""
    from transformers import LlamaConfig, LlamaForCausalLM

    module = LlamaForCausalLM(LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=7, attention_dropout=0.1, tie_word_embeddings=True,
    ))  # fmt: skip
    replicas = comm.get_world_size() // case.degree
    config = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // SEQUENCE // replicas,
        "gradient_accumulation_steps": 1, "steps_per_print": 10**9,
        "tensor_parallel": {"autotp_size": case.degree},
        "zero_optimization": {"stage": case.stage, "reduce_bucket_size": 4000},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20}},
        "spotspeed": {"path": path, "interval": {"seconds": None}}, **case.config,
    }  # fmt: skip
    return deepspeed.initialize(
        model=module, model_parameters=module.parameters(), config=config
    )[0]  # fmt: skip


CASES: dict[str, Case] = {
    "pipe-0": Case(_pipeline, 0, {}, has_extra_group=True),
    "pipe-0-bf16": Case(_pipeline, 0, BF16),
    "pipe-1": Case(_pipeline, 1, {}),
    "pipe-1-bf16": Case(_pipeline, 1, {**BF16, **INTO_BF16}),
    "pipe-1-bf16opt": Case(_pipeline, 1, {**BF16, **INTO_FP32}),
    "pipe-1-fp16": Case(_pipeline, 1, FP16),
    "pipe-of-1": Case(_pipeline, 1, {}, degree=1),
    "pipe-of-4": Case(_pipeline, 1, {}, degree=4),
    "tensor-0": Case(_tensor_parallel, 0, {}),
    "tensor-1-bf16": Case(_tensor_parallel, 1, {**BF16, **INTO_BF16}),
    "tensor-1-bf16opt": Case(_tensor_parallel, 1, {**BF16, **INTO_FP32}),
    "tensor-2": Case(_tensor_parallel, 2, {}),
    "tensor-of-1": Case(_tensor_parallel, 2, {}, degree=1),
    "tensor-of-4": Case(_tensor_parallel, 2, {}, degree=4),
    "moe-0": Case(_mixture, 0, {}),
    "moe-0-bf16": Case(_mixture, 0, BF16),
    "moe-1": Case(_mixture, 1, {}),
    "moe-2": Case(_mixture, 2, {}),
    "moe-2-bf16": Case(_mixture, 2, {**BF16, **INTO_BF16}),
    "moe-of-1": Case(_mixture, 2, {}, degree=1),
    "moe-of-4": Case(_mixture, 2, {}, degree=4),
}


def build(name: str, path: str, *, seed: int) -> Any:
    """A fresh engine with a "spotspeed" block for `path`."""
    get_accelerator().is_fp16_supported = lambda: True
    torch.manual_seed(seed)
    return CASES[name].make(CASES[name], path)


def train(engine: Any, steps: int) -> list[float]:
    """So many steps from `engine.global_steps` on; the mean loss of each."""
    losses = []
    for _ in range(steps):
        generator = torch.Generator().manual_seed(1000 + engine.global_steps)
        tokens = torch.randint(0, 7, (GLOBAL_BATCH,), generator=generator)
        replica = comm.get_rank(group=engine.data_parallel_group)
        share = GLOBAL_BATCH // engine.dp_world_size
        own = tokens[replica * share : (replica + 1) * share]
        if hasattr(engine, "train_batch"):
            losses.append(float(engine.train_batch(_micro_batches(own))))
            continue
        if hasattr(engine.module, "generate"):
            rows = own.reshape(-1, SEQUENCE)
            loss = engine(input_ids=rows, labels=rows).loss
        else:
            loss = engine(own)
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        comm.all_reduce(total)
        losses.append(float(total) / engine.dp_world_size)
    return losses


def _micro_batches(tokens: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return ((part, (part + 1) % 7) for part in tokens.split(MICRO_BATCH))
