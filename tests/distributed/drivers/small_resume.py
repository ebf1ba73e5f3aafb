"""Trains, keeps the state of one boundary, goes on; then a fresh engine goes on from that state.

Run as `resume_small.py CASE ...` under any number of ranks. Tensors of parameters and optimizer
travel through the state provider's own pieces, everything else through `SmallState` and plain data.
Prints one line per case; exits 1 when a resumed step differs in any bit.
"""

from __future__ import annotations

import os
import random
import sys

import deepspeed
import numpy as np
import torch
from deepspeed import checkpointing
from torch.utils.data import DataLoader, Dataset

from spotspeed.core.layout import Extent, StoredTensor
from spotspeed.core.plain import decode, encode
from spotspeed.state import boundary
from spotspeed.state.boundary import PASS
from spotspeed.state.cursor import Cursor
from spotspeed.state.loader import engine_sampler, ordered_loader
from spotspeed.state.plain_tensors import from_plain, to_plain
from spotspeed.state.provider import provider_for
from spotspeed.state.small import SmallState

CUT, LAST = 3, 7
ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 17, "loss_scale_window": 2,
                 "hysteresis": 1}}  # fmt: skip
WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20}}}
CASES = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero0-bf16": {"zero_optimization": {"stage": 0}, **BF16},
    "zero1": {"zero_optimization": {"stage": 1}, **BF16, **WARMUP},
    "zero1-batchnorm": {"zero_optimization": {"stage": 1}},
    "zero1-bf16-optimizer": {"zero_optimization": {"stage": 1}, **BF16,
                             "data_types": {"grad_accum_dtype": "fp32"}},
    "zero2-checkpointing": {"zero_optimization": {"stage": 2}, **BF16},
    "zero2-fp16": {"zero_optimization": {"stage": 2}, **FP16},
    "zero3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, **BF16,
              **WARMUP},
    "zero3-fp16": {"zero_optimization": {"stage": 3, "sub_group_size": 100}, **FP16},
}  # fmt: skip


class Model(torch.nn.Module):
    """Dropout, a running mean, a buffer made by the first forward, Python's and numpy's chance."""

    def __init__(self, norm: type[torch.nn.Module], *, is_checkpointed: bool) -> None:
        super().__init__()
        self.is_checkpointed = is_checkpointed
        self.first, self.second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 1)
        self.norm = norm(16)
        self.register_buffer("running", torch.zeros(16))
        self.register_buffer("seen", None, persistent=False)
        self.register_buffer("spread", torch.zeros(1).expand(4), persistent=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.dropout(self.first(x), 0.3)
        self.running.mul_(0.9).add_(hidden.detach().mean(0).to(self.running.dtype), alpha=0.1)
        hidden = self.norm(hidden - self.running.to(x.dtype)) * (1 + 0.1 * random.random())
        hidden = hidden + float(np.random.rand()) * 0.1
        if self.is_checkpointed:  # Computed again in the backward, with the numbers of the forward.
            hidden = checkpointing.checkpoint(self.drop_by_tracker, hidden)
        count = torch.zeros(1) if self.seen is None else self.seen
        self.seen = count + 1
        return (self.second(hidden) * (1 + 0.01 * count.item())).float().pow(2).mean()

    def drop_by_tracker(self, hidden: torch.Tensor) -> torch.Tensor:
        """Dropout from the activation checkpointing's own generator, as tensor parallelism has."""
        with checkpointing.get_cuda_rng_tracker().fork("dropout"):
            return torch.nn.functional.dropout(torch.tanh(hidden), 0.3)


class Saver:
    """The part of a checkpointer that matters here: keep the small state of every boundary."""

    def __init__(self, small: SmallState) -> None:
        self.small, self.kept = small, {}

    def before_update(self, engine) -> None:
        pass

    def after_update(self, engine) -> None:
        self.small.record()
        if engine.global_steps == CUT:
            self.kept = keep(engine, self.small)

    def before_forward(self, engine) -> None:
        raise AssertionError("nobody watches the forward")

    def on_save(self, engine, arguments):
        return PASS

    def on_load(self, engine, arguments, original):
        return PASS

    def on_destroy(self, engine) -> None:
        pass


def keep(engine, small):
    record = small.snapshot(CUT)
    provider = provider_for(engine)
    pieces = provider.pieces() + provider.derived_mismatches() + small.buffer_pieces(record)
    return {
        "pieces": [(piece.fragment, piece.tensor.clone()) for piece in pieces],
        "job": encode(to_plain(small.job(record)), what="job"),
        "rank": encode(to_plain(small.rank(record)), what="rank"),
    }


def put_back(engine, small, kept):
    """Fill the fresh engine from the pieces of all ranks, and from this rank's own buffers."""
    everywhere = [None] * int(os.environ["WORLD_SIZE"])
    torch.distributed.all_gather_object(everywhere, kept["pieces"])
    scope, tensors = f"rank-{os.environ['RANK']}", {}
    for fragment, tensor in (pair for pairs in everywhere for pair in pairs):
        if fragment.key.kind != "buffer" or fragment.key.scope == scope:
            tensors.setdefault(fragment.key, []).append((fragment, tensor))
    stored = {
        key: StoredTensor(parts[0][0].dtype, parts[0][0].shape, tuple(
            Extent(fragment.interval, 0, 0) for fragment, _ in parts))
        for key, parts in tensors.items()
    }  # fmt: skip
    provider = provider_for(engine)
    targets = provider.prepare_restore({k: v for k, v in stored.items() if k.kind != "buffer"})
    targets += small.buffer_targets({k: v for k, v in stored.items() if k.kind == "buffer"})
    for target in targets:
        for fragment, tensor in tensors.get(target.fragment.key, ()):
            common = fragment.interval.intersect(target.fragment.interval)
            if common is not None:
                source = tensor[common.start - fragment.interval.start :][: common.count]
                start = common.start - target.fragment.interval.start
                target.tensor[start : start + common.count] = source
    provider.finish_restore()
    job = from_plain(decode(kept["job"], source="job"))
    rank = from_plain(decode(kept["rank"], source="rank"))
    notes = small.apply(job, rank, written_by=int(os.environ["WORLD_SIZE"]))
    assert notes == [], notes
    assert (engine.global_steps, engine.micro_steps) == (CUT, 0)
    return job


def build(name, seed):
    config = CASES[name]
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    is_checkpointed = name.endswith("checkpointing")
    norm = torch.nn.BatchNorm1d if "batchnorm" in name else torch.nn.LayerNorm
    model = Model(norm, is_checkpointed=is_checkpointed)
    checkpointing.get_cuda_rng_tracker().reset()
    if is_checkpointed:
        checkpointing.configure(None, partition_activations=False)
        checkpointing.get_cuda_rng_tracker().add("dropout", seed)
    groups = [
        {"params": list(model.first.parameters()), "lr": 2e-2, "weight_decay": 0.0},
        {"params": [*model.norm.parameters(), *model.second.parameters()]},
    ]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups,
        config={"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2,
                "optimizer": ADAM, "steps_per_print": 10**6, **config},
    )  # fmt: skip
    small = SmallState(engine, provider_for(engine).group_names)
    return engine, small


def data(engine, small, stored):
    """Micro-batches through a real DataLoader with workers, from the stored cursor on."""
    samples = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    dtype = next(engine.module.parameters()).dtype
    loader = DataLoader(Samples(samples.to(dtype)), batch_size=4, shuffle=True, num_workers=1)
    sampler = engine_sampler(engine, loader, stored=stored)
    small.cursor = Cursor(
        sampler.order, start_sample=sampler.start_sample, global_samples=engine.global_samples
    )
    return iter(ordered_loader(loader, sampler))


class Samples(Dataset):
    """Samples with random augmentation."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index] + 0.01 * torch.rand(8, dtype=self.samples.dtype)


def train(engine, batches, last):
    losses = []
    while engine.global_steps < last:
        loss = engine(next(batches))
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().clone())
    return losses


def rates(engine):
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]


def run_case(name):
    config = CASES[name]
    engine, small = build(name, seed=11 + int(os.environ["RANK"]))
    batches = data(engine, small, None)
    saver = Saver(small)
    boundary.bind(engine, saver)
    losses = train(engine, batches, LAST)
    scale = getattr(engine.optimizer, "cur_scale", None)
    skipped, expected = engine.skipped_steps, losses[2 * CUT :]
    final = [(fragment, t) for fragment, t in keep_final(engine)]
    ends = (rates(engine), scale, skipped, engine.global_samples, engine.get_lr())
    boundary.unbind(engine)
    engine.destroy()

    engine, small = build(name, seed=999)
    job = put_back(engine, small, saver.kept)
    found = train(engine, data(engine, small, job["cursor"]), LAST)
    assert len(found) == len(expected) == 2 * (LAST - CUT)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (found, expected)
    scale = getattr(engine.optimizer, "cur_scale", None)
    assert ends == (
        rates(engine), scale, engine.skipped_steps, engine.global_samples, engine.get_lr()
    )  # fmt: skip
    for (fragment, tensor), (again, other) in zip(final, keep_final(engine), strict=True):
        assert fragment == again and torch.equal(tensor, other), fragment.key
    if "fp16" in config:
        assert skipped > 0, "the case is meant to skip steps"
    engine.destroy()
    sys.stdout.write(f"rank {os.environ['RANK']}: {name}: resumed bit for bit, {skipped} skipped\n")


def keep_final(engine):
    return [(p.fragment, p.tensor.clone()) for p in provider_for(engine).pieces()]


def main() -> None:
    from deepspeed.accelerator import get_accelerator

    # The CPU accelerator computes in fp16 but does not say so.
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed("gloo")
    for name in sys.argv[1:] or CASES:
        run_case(name)


if __name__ == "__main__":
    main()
