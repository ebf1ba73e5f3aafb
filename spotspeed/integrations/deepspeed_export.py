"""Writes a checkpoint as the directory that DeepSpeed's own `load_checkpoint` takes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from spotspeed.checkpoint.model import Model, Weight, read_model
from spotspeed.checkpoint.named import CLIENT_STATE, decode_client_state
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.core.interval import Interval
from spotspeed.core.layout import (
    KIND_BLOB,
    KIND_BUFFER,
    KIND_CLIENT,
    KIND_MASTER,
    KIND_WEIGHT,
    Fragment,
)
from spotspeed.core.layout import TensorKey as Key
from spotspeed.errors import ConfigError, InvalidLayoutError, UnsupportedLayoutError
from spotspeed.integrations.deepspeed_files import model_file, optimizer_file, write_file
from spotspeed.integrations.deepspeed_layout import (
    FlatPartition,
    dealt_out,
    gathered,
    partitions_3,
    partitions_12,
    shard_size,
)
from spotspeed.state.piece import dtype_of
from spotspeed.state.plain_tensors import from_plain
from spotspeed.storage.contract import Storage

STAGES = (1, 2, 3)
SUB_GROUP_SIZE = 1_000_000_000
"""DeepSpeed's default for `sub_group_size`, in elements."""
SCALARS = frozenset({"step", "mu_product"})
"""Optimizer state with one number for a whole partition."""
_UNKNOWN = frozenset({"Adagrad", "DeepSpeedCPUAdagrad", "MuonWithAuxAdam", "Muon"})
"""Optimizers for which DeepSpeed rebuilds its groups or keeps state of another shape."""


@dataclass(frozen=True, slots=True)
class Target:
    """The engine that is going to load it; `is_dealt` is its `round_robin_gradients`."""

    ranks: int
    stage: int
    is_dealt: bool = False
    sub_group_size: int = SUB_GROUP_SIZE


def target_of(
    reader: CheckpointReader, *, ranks: int, stage: int | None, sub_group_size: int | None
) -> Target:
    """An engine configured as the one that wrote the checkpoint, but for what is given."""
    said = read_model(reader).job["model"]
    is_dealt = bool(said.get("round_robin"))
    return Target(ranks, int(said["zero_stage"]) if stage is None else stage, is_dealt,
                  sub_group_size or SUB_GROUP_SIZE)  # fmt: skip


def export_deepspeed(
    reader: CheckpointReader, storage: Storage, tag: str, target: Target
) -> dict[str, Any]:
    """Write the files of `tag`, then "latest"; durable on return. Returns counts for a person.

    Memory: the module in its own dtype, then one rank's optimizer partition at a time. Raises
    UnsupportedLayoutError for what DeepSpeed could not load, ConfigError when the tag is there.
    """
    if target.stage not in STAGES or target.ranks < 1:
        raise UnsupportedLayoutError(
            f"ZeRO stage {target.stage} on {target.ranks} ranks cannot be written: give --stage 1, "
            f"2 or 3, as in the config of the engine that is going to load it"
        )
    if storage.list(tag):
        raise ConfigError(f"{storage.url}/{tag}: there is something already; choose another place")
    source = _Source(reader, read_model(reader), target)
    source.check()
    size_bytes = 0
    if target.stage < 3:
        state = _model_state(source, source.module())
        size_bytes += write_file(storage, model_file(tag, None), state)
        del state
    for rank in range(target.ranks):
        if target.stage == 3:
            module = source.placeholders()
            state = _model_state(source, module, source.frozen_shards(rank))
            size_bytes += write_file(storage, model_file(tag, rank), state)
        key = optimizer_file(tag, rank, is_bf16=source.is_bf16)
        size_bytes += write_file(storage, key, _optimizer_state(source, rank))
    storage.put("latest", tag.encode())
    return {"tag": tag, "ranks": target.ranks, "stage": target.stage, "size_bytes": size_bytes}


@dataclass
class _Source:
    """The checkpoint in the terms of the engine that is going to load it."""

    reader: CheckpointReader
    model: Model
    target: Target
    kinds: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        others = (KIND_MASTER, KIND_WEIGHT, KIND_BUFFER, KIND_BLOB, KIND_CLIENT)
        for key in sorted(self.reader.tensors()):
            if key.kind not in others:
                self.kinds.setdefault(key.name, []).append(key.kind)

    def check(self) -> None:
        """Raise UnsupportedLayoutError for what has no equal in DeepSpeed's files."""
        optimizer = str(self.said.get("optimizer"))
        if optimizer in _UNKNOWN:
            raise UnsupportedLayoutError(
                f"optimizer {optimizer}: DeepSpeed lays its state out in a way that is not "
                f"written here; restore with spotspeed instead"
            )
        if self.said.get("mesh"):
            raise UnsupportedLayoutError(
                f"the model is divided ({self.said['mesh']['degrees']}): only data-parallel "
                f"training is written; restore with spotspeed instead"
            )
        scopes = sorted({key.scope for key in self.reader.tensors()
                         if key.kind == KIND_MASTER and key.scope})  # fmt: skip
        if scopes:
            raise UnsupportedLayoutError(
                f"parameters of {', '.join(scopes[:4])}: only data-parallel training is written"
            )

    @property
    def said(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.model.job["model"]
        return found

    @cached_property
    def weights(self) -> dict[str, Weight]:
        return {weight.name: weight for weight in self.model.weights}

    @cached_property
    def counts(self) -> dict[str, int]:
        return {name: math.prod(weight.shape) for name, weight in self.weights.items()}

    @cached_property
    def is_bf16(self) -> bool:
        """Whether the engine's files bear the prefix of bf16 training."""
        return any(weight.dtype == "bfloat16" for weight in self.trained)

    @property
    def trained(self) -> list[Weight]:
        return [weight for weight in self.model.weights
                if weight.source is not None and weight.source.kind == KIND_MASTER]  # fmt: skip

    @property
    def frozen(self) -> list[Weight]:
        names = {weight.name for weight in self.trained}
        return [weight for weight in self.model.weights
                if not weight.is_buffer and weight.name not in names]  # fmt: skip

    @cached_property
    def groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        """The param_groups that DeepSpeed keeps, in its order: names and hyper-parameters."""
        trained = {weight.name for weight in self.trained}
        was_dealt, ranks = bool(self.said.get("round_robin")), self.reader.manifest.ticket
        found = []
        for group in self.model.job["groups"]:
            names = list(group["names"])
            if was_dealt:
                names = gathered(names, ranks.world_size)
            names = [name for name in names if name in trained]
            if self.target.is_dealt and self.target.stage < 3:
                names = dealt_out(names, self.target.ranks)
            if names:
                found.append((names, from_plain(group["settings"])))
        return found

    def partitions(self, rank: int) -> list[FlatPartition]:
        names, ranks = [names for names, _ in self.groups], self.target.ranks
        if self.target.stage == 3:
            return partitions_3(names, self.counts, ranks, rank, self.target.sub_group_size)
        return partitions_12(names, self.counts, ranks, rank)

    def read(self, key: Key, interval: Interval) -> torch.Tensor:
        """Elements of one stored tensor, flat, in the stored dtype."""
        stored = self.reader.tensors()[key]
        found = torch.empty(interval.count, dtype=dtype_of(stored.dtype))
        if interval.count:
            fragment = Fragment(key, stored.dtype, stored.shape, interval)
            self.reader.read_into([(fragment, found.view(torch.uint8).numpy().data)])
        return found

    def weight(self, weight: Weight) -> torch.Tensor:
        """The tensor as the module holds it: the rounded master but for what differs from it."""
        dtype = dtype_of(weight.dtype)
        if weight.source is None:
            return torch.empty(weight.shape, dtype=dtype)
        whole = self.read(weight.source, Interval(0, self.counts[weight.name])).to(dtype)
        for start, key in weight.overrides.items():
            stored = self.reader.tensors()[key]
            count = math.prod(stored.shape)
            if stored.dtype == weight.dtype:
                whole.narrow(0, start, count).copy_(self.read(key, Interval(0, count)))
        return whole.view(weight.shape)

    def module(self) -> OrderedDict[str, torch.Tensor]:
        """The module's state_dict; tied names share one tensor, as in the module."""
        found = OrderedDict((name, self.weight(weight)) for name, weight in self.weights.items())
        found.update((alias, found[name]) for alias, name in self.model.aliases.items())
        return found

    def placeholders(self) -> OrderedDict[str, torch.Tensor]:
        """The state_dict of a module that ZeRO-3 has partitioned: buffers, and empty tensors."""
        found: OrderedDict[str, torch.Tensor] = OrderedDict()
        for name, weight in self.weights.items():
            empty = torch.empty(0, dtype=dtype_of(weight.dtype))
            found[name] = self.weight(weight) if weight.is_buffer else empty
        found.update((alias, found[name]) for alias, name in self.model.aliases.items())
        return found

    def frozen_shards(self, rank: int) -> OrderedDict[str, torch.Tensor]:
        """ZeRO-3's shards of what is not trained, padded with zeros."""
        found: OrderedDict[str, torch.Tensor] = OrderedDict()
        for weight in self.frozen:
            size = shard_size(self.counts[weight.name], self.target.ranks)
            flat = self.weight(weight).view(-1)
            shard = torch.zeros(size, dtype=flat.dtype)
            part = flat[rank * size : (rank + 1) * size]
            shard[: part.numel()] = part
            found[weight.name] = shard
        return found


def _model_state(
    source: _Source, module: Mapping[str, torch.Tensor],
    shards: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The content of a model file, as `DeepSpeedEngine._common_checkpoint_state` makes it."""
    job, ranks = source.model.job, source.target.ranks
    schedule = job["schedule"].get("lr_scheduler")
    parts = source.partitions(0)
    fragments = shards
    if source.target.stage == 2:
        fragments = OrderedDict((weight.name, module[weight.name]) for weight in source.frozen)
    client = decode_client_state(job.get(CLIENT_STATE), source.reader)
    return {
        **client,
        "module": module,
        "buffer_names": [weight.name for weight in source.model.weights if weight.is_buffer],
        "optimizer": None,
        "param_shapes": [
            OrderedDict((name, torch.Size(source.weights[name].shape)) for name in part.names)
            for part in parts
        ],
        "frozen_param_shapes": None if fragments is None else OrderedDict(
            (weight.name, torch.Size(weight.shape)) for weight in source.frozen
        ),
        "shared_params": dict(source.model.aliases),
        "frozen_param_fragments": fragments,
        "lr_scheduler": None if schedule is None else from_plain(schedule["state"]),
        "data_sampler": None, "random_ltd": None,
        **{name: job["counters"][name] for name in
           ("skipped_steps", "global_steps", "global_samples")},
        "dp_world_size": ranks, "mp_world_size": 1,
        "ds_config": {}, "ds_version": str(source.said["deepspeed"]),
    }  # fmt: skip


def _optimizer_state(source: _Source, rank: int) -> dict[str, Any]:
    """The content of one rank's optimizer file, as `_save_zero_checkpoint` makes it."""
    partitions = source.partitions(rank)
    masters = [_flat(source, part, KIND_MASTER) for part in partitions]
    states = {index: state for index, part in enumerate(partitions)
              if (state := _state_of(source, part))}  # fmt: skip
    groups = [
        {**settings, "params": [i for i, part in enumerate(partitions) if part.group == index]}
        for index, (_, settings) in enumerate(source.groups)
    ]
    base = {"state": states, "param_groups": groups}
    version = str(source.said["deepspeed"])
    scaler, is_dynamic = _scaler(source)
    shared = {"dynamic_loss_scale": is_dynamic, "overflow": False, "ds_version": version,
              "loss_scaler": scaler}  # fmt: skip
    if source.target.stage == 3:
        content = {**shared, "zero_stage": 3, "partition_count": source.target.ranks,
                   "optimizer_state_dict": base, "fp32_flat_groups": masters}  # fmt: skip
    else:
        lean = [master[: master.numel() - part.padding].clone()
                for master, part in zip(masters, partitions, strict=True)]  # fmt: skip
        content = {
            **shared, "base_optimizer_state": base, "single_partition_of_fp32_groups": lean,
            "zero_stage": source.target.stage,
            "group_paddings": [part.padding for part in partitions],
            "partition_count": [source.target.ranks] * len(partitions),
        }  # fmt: skip
    return {"optimizer_state_dict": content, "ds_config": {}, "ds_version": version}


def _flat(source: _Source, part: FlatPartition, kind: str) -> torch.Tensor:
    """One partition of one kind of state; what belongs to no parameter is zero."""
    first = source.reader.tensors()[Key(kind, part.names[0])]
    found = torch.zeros(part.size, dtype=dtype_of(first.dtype))
    for span in part.spans:
        elements = source.read(Key(kind, span.name), span.interval)
        found.narrow(0, span.offset, span.interval.count).copy_(elements)
    return found


def _state_of(source: _Source, part: FlatPartition) -> dict[str, Any]:
    kinds = source.kinds.get(part.names[0], [])
    for name in part.names:
        if source.kinds.get(name, []) != kinds:
            raise InvalidLayoutError(
                f"{name} has the state {source.kinds.get(name, [])}, {part.names[0]} of the same "
                f"group has {kinds}: DeepSpeed keeps both in one tensor"
            )
    return {kind: _scalar(source, part.names, kind) if kind in SCALARS
            else _flat(source, part, kind) for kind in kinds}  # fmt: skip


def _scalar(source: _Source, names: Sequence[str], kind: str) -> Any:
    values = {name: source.read(Key(kind, name), Interval(0, 1)) for name in names}
    first = values[names[0]]
    differing = [name for name, value in values.items() if value.item() != first.item()]
    if differing:
        raise InvalidLayoutError(
            f"{kind} is {values[differing[0]].item()} for {differing[0]} and {first.item()} for "
            f"{names[0]}: DeepSpeed has one number for the group"
        )
    # torch keeps these as tensors without dimensions, DeepSpeed's own optimizers as integers.
    return first.view(()) if first.dtype.is_floating_point else int(first.item())


def _scaler(source: _Source) -> tuple[Any, bool]:
    """DeepSpeed's scaler object with the stored progress, and whether it is dynamic."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    loss = (source.model.job.get("scaler") or {}).get("loss") or {"is_dynamic": False, "fields": {}}
    fields, settings = loss["fields"], source.said.get("loss_scale")
    if not loss["is_dynamic"]:
        return LossScaler(scale=fields.get("cur_scale", 1.0)), False
    if settings is None:
        raise UnsupportedLayoutError(
            "dynamic loss scaling: DeepSpeed's files hold the scaler's settings, which this "
            "checkpoint has not; restore it with spotspeed and save it once more"
        )
    made = DynamicLossScaler(
        fields["cur_scale"], settings["scale_window"], settings["min_scale"],
        settings["delayed_shift"], settings["consecutive_hysteresis"],
    )  # fmt: skip
    for name, value in {**settings, **fields}.items():
        setattr(made, name, value)
    return made, True
