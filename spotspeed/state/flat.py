"""What the optimizers that flatten a param_group share: slots, groups and DeepSpeed's views."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from spotspeed.core.interval import Interval
from spotspeed.errors import UnsupportedLayoutError
from spotspeed.state.parameters import ParameterNames
from spotspeed.state.partition import Slot

Placed = tuple[str, tuple[int, ...], torch.Tensor, int]
"""(name, shape, low-precision parameter, offset in the concatenation of its group)"""


class GroupLayout:
    """The param_group of each master; found by identity, as DeepSpeed may rebuild the groups."""

    def __init__(self, optimizer: Any) -> None:
        self._groups: dict[int, Mapping[str, Any]] = {
            id(master): group for group in optimizer.param_groups for master in group["params"]
        }

    def of(self, master: torch.Tensor) -> Mapping[str, Any]:
        """The group of a master; raises UnsupportedLayoutError when it is in none."""
        group = self._groups.get(id(master))
        if group is None:
            raise UnsupportedLayoutError(
                f"a master of {master.numel()} elements is in no param_group of the optimizer"
            )
        return group


def flat_slots(parameters: Iterable[Placed], owned: Interval) -> tuple[Slot, ...]:
    """The slots of a partition that holds the range `owned` of a group's concatenation."""
    slots = []
    for name, shape, parameter, offset in parameters:
        common = Interval(offset, offset + math.prod(shape)).intersect(owned)
        if common is None:
            continue
        interval = common.shift(-offset)
        weight = None
        if parameter.numel() == math.prod(shape):
            weight = parameter.detach().view(-1).narrow(0, interval.start, interval.count)
        slots.append(Slot(name, shape, interval, common.start - owned.start, weight))
    return tuple(slots)


def names_by_group(
    optimizer: Any,
    names: ParameterNames,
    groups: Iterable[tuple[torch.Tensor, Iterable[torch.Tensor]]],
) -> list[list[str]]:
    """The parameters of each param_group; `groups` pairs a master with the parameters in it."""
    hyper = GroupLayout(optimizer)
    found: dict[int, list[str]] = {id(group): [] for group in optimizer.param_groups}
    for master, parameters in groups:
        found[id(hyper.of(master))].extend(names.of(parameter) for parameter in parameters)
    return [found[id(group)] for group in optimizer.param_groups]


def relink_fragments(wrapper: Any, groups: Sequence[Sequence[Any]]) -> None:
    """Make `safe_get_*` see the optimizer state as it is: views of it, or none yet."""
    wrapper._hp_optimizer_states_linked = False
    if any(wrapper.optimizer.state.values()):
        wrapper._lazy_init_hp_params_optimizer_state()
        return
    for parameter in (parameter for group in groups for parameter in group):
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            mapping.optim_fragment = None
