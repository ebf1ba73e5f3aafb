"""The small state beside the tensors: kept, put back, and read from the engine independently."""

from __future__ import annotations

import os
from typing import Any

import torch
from deepspeed import comm

from spotspeed.core.interval import Interval
from spotspeed.core.layout import Extent, StoredTensor
from spotspeed.core.plain import decode, encode
from spotspeed.state.plain_tensors import from_plain, to_plain
from spotspeed.state.provider import StateProvider
from spotspeed.state.small import SmallState

_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis", "scale_window")


def keep(engine: Any, provider: StateProvider) -> dict[str, Any]:
    """What a checkpoint stores of it: the job's, and each rank's with its buffers. Collective."""
    small = SmallState(engine, provider.group_names)
    small.record()
    record = small.snapshot(engine.global_steps)
    buffers = [(piece.fragment.key, piece.fragment.shape, piece.fragment.dtype,
                piece.tensor.clone()) for piece in small.buffer_pieces(record)]  # fmt: skip
    own = {"state": encode(to_plain(small.rank(record)), what="rank"), "buffers": buffers}
    ranks: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(ranks, own)
    return {"job": encode(to_plain(small.job(record)), what="job"), "ranks": ranks}


def put_back(engine: Any, provider: StateProvider, kept: dict[str, Any]) -> None:
    """As a restore does, after the tensors."""
    small = SmallState(engine, provider.group_names)
    own = kept["ranks"][int(os.environ["RANK"]) % len(kept["ranks"])]
    tensors = {key: tensor for key, _, _, tensor in own["buffers"]}
    stored = {key: StoredTensor(dtype, shape, (Extent(Interval(0, tensor.numel()), 0, 0),))
              for key, shape, dtype, tensor in own["buffers"]}  # fmt: skip
    for target in small.buffer_targets(stored):
        target.tensor.copy_(tensors[target.fragment.key])
    job = from_plain(decode(kept["job"], source="job"))
    small.apply(job, from_plain(decode(own["state"], source="rank")), written_by=len(kept["ranks"]))


def settings(engine: Any) -> dict[str, Any]:
    """Hyper-parameters, counts, scale, schedule and every rank's buffers. Collective."""
    wrapper = engine.optimizer
    inner = getattr(wrapper, "optimizer", wrapper)
    schedule = {name: value for name, value in engine.lr_scheduler.state_dict().items()
                if name != "lr_lambdas"}  # fmt: skip
    scalers = (getattr(wrapper, name, None) for name in ("loss_scaler", "loss_scale_config"))
    buffers = {name: value.tolist() for name, value in engine.module.named_buffers()}
    everywhere: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(everywhere, buffers)
    return {
        "groups": [{name: value for name, value in group.items() if name != "params"}
                   for group in inner.param_groups],
        "counts": (engine.global_steps, engine.global_samples, engine.skipped_steps),
        "schedule": schedule,
        "scale": {name: getattr(scaler, name) for scaler in scalers for name in _SCALE
                  if hasattr(scaler, name)},
        "buffers": everywhere,
    }  # fmt: skip
