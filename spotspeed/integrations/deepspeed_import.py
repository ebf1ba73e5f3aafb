"""Brings a checkpoint that DeepSpeed saved into a sealed checkpoint, exactly and without pickle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from spotspeed.checkpoint.named import CLIENT_STATE
from spotspeed.checkpoint.save import JOB_KEY, rank_key
from spotspeed.checkpoint.whole import Held, blob, write_whole
from spotspeed.core import plain
from spotspeed.core.interval import Interval
from spotspeed.core.layout import KIND_BUFFER, KIND_MASTER, KIND_WEIGHT, Fragment, TensorKey
from spotspeed.core.manifest import Manifest
from spotspeed.errors import FormatError
from spotspeed.integrations.deepspeed_directory import Directory, open_directory
from spotspeed.integrations.deepspeed_layout import (
    FlatPartition,
    partitions_3,
    partitions_12,
    shard_size,
)
from spotspeed.state import groups
from spotspeed.state.piece import dtype_name
from spotspeed.state.plain_tensors import to_plain
from spotspeed.state.set_aside import set_aside
from spotspeed.state.weights import element_scope
from spotspeed.storage.contract import Storage

SCOPE = "rank-0"
_VERSION = 1
_OWN_KEYS = frozenset({
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps",
    "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version",
    "checkpoint_parallel_dimensions", "sparse_tensor_module_names", "universal_checkpoint_info",
    "micro_steps", "num_experts",
})  # fmt: skip
"""What DeepSpeed itself keeps in a model file; everything else is the user's client_state."""
_PROGRESS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True, slots=True)
class Imported:
    """What was written, and in words what a DeepSpeed checkpoint does not have."""

    manifest: Manifest
    notes: tuple[str, ...]


def import_deepspeed(
    source: Path, storage: Storage, *, tag: str | None = None, scheduler: str | None = None,
    replaces: bool = False,
) -> Imported:  # fmt: skip
    """Store the checkpoint in `source` at the path of `storage`; sealed on return.

    `tag` is DeepSpeed's, by default the one in "latest". `scheduler` names the class of the
    learning-rate schedule where the configuration did not make it; `replaces` is `write_whole`'s.
    Masters, optimizer state, weights and buffers keep every bit; tensors are mapped, not read into
    memory. Raises FormatError, naming file and type, for what cannot be read without running code,
    ConfigError where the path holds a run.
    """
    directory = open_directory(source, tag)
    state = _State(directory, scheduler)
    try:
        tensors = [*state.tensors()]
        stored = state.job()
        stored[CLIENT_STATE], large = set_aside(stored[CLIENT_STATE])
        tensors += [_held(fragment.key, flat, fragment.shape) for fragment, flat in large]
        job = plain.encode(to_plain(stored), what="job state")
        rank = plain.encode(
            {"version": _VERSION, "step": state.step, "rank": -1, "world_size": 1, "rng": {}},
            what="rank state",
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise FormatError(
            f"{directory.folder}: not laid out as DeepSpeed does: {type(error).__name__}: {error}"
        ) from error
    tensors += [blob(JOB_KEY, job), blob(rank_key(0), rank)]
    manifest = write_whole(storage, tensors, tag=directory.tag, step=state.step,
                           replaces=replaces)  # fmt: skip
    return Imported(manifest, tuple(state.notes))


@dataclass
class _State:
    """A DeepSpeed checkpoint as named tensors and a description of the job."""

    directory: Directory
    scheduler: str | None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def first(self) -> dict[str, Any]:
        return self.directory.models[0]

    @property
    def step(self) -> int:
        return int(self.first["global_steps"])

    @cached_property
    def runs(self) -> list[list[str]]:
        """The parameters of each flat tensor, in the order in which they lie in it."""
        return [list(shapes) for shapes in self.first["param_shapes"]]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the trained parameters."""
        return {name: tuple(shape) for shapes in self.first["param_shapes"]
                for name, shape in shapes.items()}  # fmt: skip

    @cached_property
    def frozen(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that no optimizer updates."""
        said = self.first.get("frozen_param_shapes")
        if said is not None:
            return {name: tuple(shape) for name, shape in said.items()}
        others = {*self.shapes, *self.first["buffer_names"], *self.first["shared_params"]}
        return {name: tuple(tensor.shape) for name, tensor in self.first["module"].items()
                if name not in others and torch.is_tensor(tensor)}  # fmt: skip

    def partitions(self, rank: int) -> list[FlatPartition]:
        counts = {name: math.prod(shape) for name, shape in self.shapes.items()}
        if self.directory.stage == 3:
            return partitions_3(self.runs, counts, self.directory.ranks, rank, None)
        paddings = self.directory.optimizers[rank].get("param_alignment_paddings")
        return partitions_12(self.runs, counts, self.directory.ranks, rank, paddings)

    def tensors(self) -> Iterator[Held]:
        """Every tensor of the training state, in pieces."""
        scalars: set[TensorKey] = set()
        for rank in range(self.directory.ranks):
            masters, base = self.directory.masters(rank), self.directory.base(rank)
            ids = [i for group in base["param_groups"] for i in group["params"]]
            parts = self.partitions(rank)
            if sorted(ids) != list(range(len(parts))) or len(masters) != len(parts):
                raise FormatError(
                    f"{self.directory.folder}: rank {rank} has {len(masters)} masters and "
                    f"optimizer state for {len(ids)}, expected {len(parts)}"
                )
            for index, (part, master) in enumerate(zip(parts, masters, strict=True)):
                yield from self._flat(part, KIND_MASTER, master)
                for kind, value in (base["state"].get(index) or {}).items():
                    if torch.is_tensor(value) and value.dim():
                        yield from self._flat(part, kind, value)
                    elif value is not None:
                        yield from _scalars(part, kind, value, scalars)
        yield from self._frozen()
        for name in self.first["buffer_names"]:
            tensor = self.first["module"][name]
            yield _held(TensorKey(KIND_BUFFER, name, SCOPE), tensor, tuple(tensor.shape))

    def _flat(self, part: FlatPartition, kind: str, flat: torch.Tensor) -> Iterator[Held]:
        flat = flat.detach().view(-1)
        needed = part.size - part.padding
        if not needed <= flat.numel() <= part.size:
            raise FormatError(
                f"{self.directory.folder}: {kind} of {part.names[0]} and others has "
                f"{flat.numel()} elements, expected {needed} to {part.size}"
            )
        for span in part.spans:
            elements = flat.narrow(0, span.offset, span.interval.count)
            yield _held(TensorKey(kind, span.name), elements, self.shapes[span.name], span.interval)
            if kind == KIND_MASTER and self.directory.stage < 3:
                yield from self._underived(span.name, span.interval, elements)

    def _underived(self, name: str, interval: Interval, master: torch.Tensor) -> Iterator[Held]:
        """The module's own elements, where they are not the master, rounded."""
        weight = self.first["module"][name].view(-1).narrow(0, interval.start, interval.count)
        expected = master.to(weight.dtype)
        if not torch.equal(weight.view(torch.uint8), expected.view(torch.uint8)):
            key = TensorKey(KIND_WEIGHT, name, element_scope(interval))
            yield _held(key, weight, (interval.count,))

    def _frozen(self) -> Iterator[Held]:
        for name, shape in self.frozen.items():
            key, count = TensorKey(KIND_WEIGHT, name), math.prod(shape)
            if not count:
                continue
            if self.directory.stage < 3:
                yield _held(key, self.first["module"][name], shape)
                continue
            size = shard_size(count, self.directory.ranks)
            for rank, model in enumerate(self.directory.models):
                interval = Interval(min(rank * size, count), min((rank + 1) * size, count))
                if interval.count:
                    shard = model["frozen_param_fragments"][name].view(-1)
                    yield _held(key, shard.narrow(0, 0, interval.count), shape, interval)

    def job(self) -> dict[str, Any]:
        """The job's blob, as `SmallState.job` and `StateProvider.describe` make it."""
        first = self.first
        return {
            "version": _VERSION, "step": self.step, "seed": 0, "world_size": 1,
            "counters": {
                "global_steps": self.step, "skipped_steps": int(first["skipped_steps"]),
                "global_samples": int(first.get("global_samples") or 0),
            },
            "schedule": self._schedule(), "groups": self._groups(), "scaler": self._scaler(),
            "cursor": None, "model": self._model(),
            CLIENT_STATE: {key: value for key, value in first.items() if key not in _OWN_KEYS},
        }  # fmt: skip

    def _schedule(self) -> dict[str, Any]:
        state = self.first.get("lr_scheduler")
        if state is None:
            return {}
        config = self.first.get("ds_config") or {}
        kind = self.scheduler or (config.get("scheduler") or {}).get("type")
        if kind is None:
            self.notes.append(
                "the class of the learning-rate scheduler is not on record: name it with "
                "--scheduler, or its progress stays behind"
            )
        return {"lr_scheduler": {"class": kind or "", "state": state}}

    def _groups(self) -> list[dict[str, Any]]:
        param_groups = self.directory.base(0)["param_groups"]
        names = [[name for index in group["params"] for name in self.runs[index]]
                 for group in param_groups]  # fmt: skip
        settings = groups.capture(SimpleNamespace(param_groups=param_groups))
        return groups.describe(settings, names)

    def _scaler(self) -> dict[str, Any]:
        scaler = self.directory.optimizers[0].get("loss_scaler")
        if scaler is None:
            return {"loss": None, "grad": None}
        fields = {name: getattr(scaler, name) for name in _PROGRESS if hasattr(scaler, name)}
        return {"loss": {"is_dynamic": bool(scaler.dynamic), "fields": fields}, "grad": None}

    def _model(self) -> dict[str, Any]:
        module, shared = self.first["module"], dict(self.first["shared_params"])
        config = self.first.get("ds_config") or {}
        masters = [master for master in self.directory.masters(0) if master.numel()]
        return {
            "provider": f"zero{self.directory.stage}", "deepspeed": str(self.first["ds_version"]),
            "zero_stage": self.directory.stage,
            "optimizer": (config.get("optimizer") or {}).get("type"),
            "master_dtype": dtype_name(masters[0]) if masters else None,
            "parameters": {
                name: self._parameter(name, tensor) for name, tensor in module.items()
                if name in self.shapes or name in self.frozen
            },
            "groups": [group["names"] for group in self._groups()],
            "aliases": shared, "transient_buffers": [], "round_robin": False,
        }  # fmt: skip

    def _parameter(self, name: str, tensor: torch.Tensor) -> Mapping[str, Any]:
        is_trained = name in self.shapes
        shape = self.shapes[name] if is_trained else self.frozen[name]
        return {"shape": list(shape), "dtype": dtype_name(tensor), "trained": is_trained}


def _scalars(part: FlatPartition, kind: str, value: Any, known: set[TensorKey]) -> Iterator[Held]:
    """One number of a flat tensor, for each of its parameters that has none yet."""
    number = value if torch.is_tensor(value) else torch.tensor(value)
    for name in part.names:
        key = TensorKey(kind, name)
        if key not in known:
            known.add(key)
            yield _held(key, number, ())


def _held(
    key: TensorKey, tensor: torch.Tensor, shape: tuple[int, ...], interval: Interval | None = None
) -> Held:
    flat = tensor.detach().contiguous().view(-1)
    found = interval if interval is not None else Interval(0, flat.numel())
    fragment = Fragment(key, dtype_name(flat), shape, found)
    data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    return fragment, data
