"""Names of the model's parameters, their aliases, and the ones that no optimizer updates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed import comm

from spotspeed.core.interval import Interval
from spotspeed.errors import CaptureError
from spotspeed.state.partition import Resident


class ParameterNames:
    """The engine's parameters by canonical name; a tied parameter has one, its first."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def of(self, parameter: torch.Tensor) -> str:
        """The canonical name; raises CaptureError for a parameter the engine does not know."""
        name = self._engine.param_names.get(parameter)
        if name is None:
            raise CaptureError(
                f"a parameter of shape {shape_of(parameter)} is updated by the optimizer or was "
                f"added to the model, but had no name when deepspeed.initialize ran: add it "
                f"before, as a parameter of the model"
            )
        return str(name)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for parameter in self._engine.module.parameters():
            yield self.of(parameter), parameter

    def aliases(self) -> dict[str, str]:
        """Every further name of a tied parameter, with the name it is stored under."""
        seen: dict[int, str] = {}
        found: dict[str, str] = {}
        for name, parameter in self._engine.module.named_parameters(remove_duplicate=False):
            if id(parameter) in seen:
                found[name] = seen[id(parameter)]
            else:
                seen[id(parameter)] = self.of(parameter)
        return found


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The logical shape, also while ZeRO-3 keeps only a shard of the parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def count_of(parameter: Any) -> int:
    """The number of elements of the whole parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def replica_of(group: Any) -> tuple[int, int]:
    """This rank's index among the replicas of a process group, and their number."""
    return int(comm.get_rank(group=group)), int(comm.get_world_size(group=group))


def replicated_residents(names: ParameterNames, owned: Iterable[str], group: Any) -> list[Resident]:
    """The parameters outside `owned`, whole on every rank of `group`; empty ones are left out."""
    updated = set(owned)
    index, count = replica_of(group)
    return [
        Resident(name, shape_of(parameter), Interval(0, parameter.numel()), parameter, index, count)
        for name, parameter in names
        if name not in updated and parameter.numel()
    ]
