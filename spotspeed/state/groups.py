"""The optimizer's per-group hyper-parameters, stored and found again by parameter names.

Names, because a group's index means nothing elsewhere: DeepSpeed drops empty groups, ZeRO-3 splits
by process group, MoE splits by expert group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from spotspeed.errors import FormatError, InvalidLayoutError

_NOT_SETTINGS = frozenset({
    "params", "param_names",  # what the group is of
    "name", "moe", "use_muon",  # how this run's DeepSpeed has split the groups
    "foreach", "fused", "capturable", "differentiable",  # how to compute, not what
})  # fmt: skip


def inner_optimizer(engine: Any) -> Any:
    """The optimizer whose param_groups the update reads: inside DeepSpeed's wrapper, if any."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def capture(optimizer: Any) -> list[dict[str, Any]]:
    """The settings of every group as they are now; owns what a later step could change."""
    return [
        {key: _own(value) for key, value in group.items() if key not in _NOT_SETTINGS}
        for group in optimizer.param_groups
    ]


def describe(
    settings: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """Captured groups as plain data with their parameters; what is not plain is left out."""
    if len(settings) != len(names):
        raise InvalidLayoutError(
            f"{len(settings)} param_groups, names for {len(names)}: the groups were changed while "
            f"they were being saved"
        )
    return [
        {"names": list(own), "settings": {k: v for k, v in group.items() if _is_plain(v)}}
        for group, own in zip(settings, names, strict=True)
    ]


def plan(
    stored: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]
) -> list[Mapping[str, Any] | None]:
    """For each live group the stored settings to take over; None leaves a group alone.

    A group without parameters is left alone. A group none of whose parameters is known is that of
    another pipeline stage and takes its settings by index. Raises InvalidLayoutError when a group
    is known in part only, or has parameters of groups that differ.
    """
    if any(set(group) != {"names", "settings"} for group in stored):
        raise FormatError("the stored param_groups are not pairs of names and settings")
    home = {name: index for index, group in enumerate(stored) for name in group["names"]}
    planned: list[Mapping[str, Any] | None] = []
    for index, own in enumerate(names):
        unknown = [name for name in own if name not in home]
        if not own:
            planned.append(None)
        elif not unknown:
            planned.append(_one_of(stored, sorted({home[name] for name in own}), index))
        elif len(unknown) == len(own) and index < len(stored):
            planned.append(stored[index]["settings"])
        else:
            raise InvalidLayoutError(
                f"param_group {index}: {unknown[:3]} {'are' if len(unknown) > 1 else 'is'} in no "
                f"stored group; the checkpoint is of other parameters"
            )
    return planned


def apply(optimizer: Any, planned: Sequence[Mapping[str, Any] | None]) -> None:
    """Write the planned settings into the live groups; tensors are filled in place."""
    for group, settings in zip(optimizer.param_groups, planned, strict=True):
        for key, value in (settings or {}).items():
            live = group.get(key)
            if key in _NOT_SETTINGS:
                continue
            if isinstance(live, torch.Tensor):
                live.copy_(torch.as_tensor(value).reshape(live.shape))
            elif isinstance(value, torch.Tensor) and isinstance(live, int | float):
                group[key] = type(live)(value.item())
            else:
                group[key] = _own(value)


def _one_of(
    stored: Sequence[Mapping[str, Any]], homes: Sequence[int], index: int
) -> Mapping[str, Any]:
    first: Mapping[str, Any] = stored[homes[0]]["settings"]
    for other in homes[1:]:
        settings = stored[other]["settings"]
        differing = [key for key in {**first, **settings}
                     if not _equal(first.get(key), settings.get(key))]  # fmt: skip
        if differing:
            raise InvalidLayoutError(
                f"param_group {index} has parameters of the stored groups {homes[0]} and {other}, "
                f"which differ in {', '.join(sorted(differing))}: group the parameters as they "
                f"were when the checkpoint was written"
            )
    return first


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return type(left) is type(right) and torch.equal(left, right)
    return bool(left == right)


def _own(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return list(value) if type(value) is list else value


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)
