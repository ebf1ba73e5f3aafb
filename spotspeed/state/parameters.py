"""Names of the model's parameters, their aliases, and the ones that no optimizer updates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from deepspeed import comm
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups

from spotspeed.core.interval import Interval
from spotspeed.errors import CaptureError
from spotspeed.state.partition import Resident

TENSOR = "tensor"
_places: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()
"""What is known of process groups."""
_expert_groups: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
"""The expert-data-parallel groups of engines by name."""


class ParameterNames:
    """The engine's parameters by canonical name; a tied parameter has one, its first.

    Experts are numbered over the whole job, not within their rank as DeepSpeed does it. Under
    tensor parallelism every name begins with the rank that has this part of the parameter.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._experts = _expert_names(engine) if getattr(engine, "has_moe_layers", False) else {}
        place = tensor_place(engine)
        self._prefix = "" if place is None else f"{TENSOR}_parallel_{place[0]}."

    def of(self, parameter: torch.Tensor) -> str:
        """The canonical name; raises CaptureError for a parameter the engine does not know."""
        name = self._experts.get(id(parameter)) or self._engine.param_names.get(parameter)
        if name is None:
            raise CaptureError(
                f"a parameter of shape {shape_of(parameter)} is updated by the optimizer or was "
                f"added to the model, but had no name when deepspeed.initialize ran: add it "
                f"before, as a parameter of the model"
            )
        return f"{self._prefix}{name}"

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for parameter in self._engine.module.parameters():
            yield self.of(parameter), parameter

    def aliases(self) -> dict[str, str]:
        """Every further name of a tied parameter, with the name it is stored under."""
        seen: dict[int, str] = {}
        found: dict[str, str] = {}
        for name, parameter in self._engine.module.named_parameters(remove_duplicate=False):
            if id(parameter) in seen:
                found[f"{self._prefix}{name}"] = seen[id(parameter)]
            else:
                seen[id(parameter)] = self.of(parameter)
        return found


def tensor_place(engine: Any) -> tuple[int, int] | None:
    """(index, number) of this rank among those that divide tensors by AutoTP; None without it."""
    size = int(getattr(engine, "autotp_size", lambda: 0)() or 0)
    return (int(groups.get_tensor_model_parallel_rank()), size) if size > 1 else None


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The logical shape, also while ZeRO-3 keeps only a shard of the parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def count_of(parameter: Any) -> int:
    """The number of elements of the whole parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def replica_of(group: Any) -> tuple[int, int]:
    """This rank's index among the replicas of a process group, and their number.

    Asked once: scripts destroy their process groups before the last save has been described.
    """
    found = None if group is None else _places.get(group)
    if found is None:
        found = int(comm.get_rank(group=group)), int(comm.get_world_size(group=group))
        if group is not None:
            _places[group] = found
    return found


def replica_of_parameter(engine: Any, parameter: Any) -> tuple[int, int]:
    """This rank's index among the ranks that hold the same whole parameter, and their number.

    An expert's are the ranks of its expert-data-parallel group.
    """
    if getattr(parameter, "allreduce", True):
        return replica_of(engine.seq_data_parallel_group)
    if engine not in _expert_groups:  # DeepSpeed empties its own table with the process groups.
        _expert_groups[engine] = dict(engine.expert_data_parallel_group)
    return replica_of(_expert_groups[engine][parameter.group_name])


def replicated_residents(
    engine: Any, names: ParameterNames, owned: Iterable[str]
) -> list[Resident]:
    """The parameters outside `owned`, whole on this rank; empty ones are left out."""
    updated = set(owned)
    return [
        Resident(
            name, shape_of(parameter), Interval(0, parameter.numel()), parameter,
            *replica_of_parameter(engine, parameter),
        )
        for name, parameter in names
        if name not in updated and parameter.numel()
    ]  # fmt: skip


def _expert_names(engine: Any) -> dict[int, str]:
    """The names of this rank's expert parameters, by identity."""
    found: dict[int, str] = {}
    for prefix, module in engine.module.named_modules():
        if not isinstance(module, MoE):
            continue
        index, _ = replica_of(engine.expert_parallel_group[module.expert_group_name])
        experts = module.deepspeed_moe.experts
        path = f"{prefix}.deepspeed_moe.experts.deepspeed_experts".removeprefix(".")
        for local, expert in enumerate(experts.deepspeed_experts):
            number = index * experts.num_local_experts + local
            for name, parameter in expert.named_parameters():
                found.setdefault(id(parameter), f"{path}.{number}.{name}")
    return found
