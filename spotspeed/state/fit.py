"""Whether a stored state fits the live model and optimizer, decided before anything is changed.

Every rank decides from the same inputs: the stored tensors, and the names and shapes of the whole
model. So all ranks refuse together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spotspeed.core.interval import Interval
from spotspeed.core.layout import (
    KIND_BUFFER,
    KIND_MASTER,
    KIND_WEIGHT,
    StoredTensor,
    TensorKey,
)
from spotspeed.errors import InvalidLayoutError, UnsupportedLayoutError
from spotspeed.state.optimizers import rule_for
from spotspeed.state.partition import Partition
from spotspeed.state.piece import dtype_of
from spotspeed.state.weights import scope_elements

KIND_BLOB = "blob"
SHOWN = 5
"""How many offenders an error lists by name."""

Stored = Mapping[TensorKey, StoredTensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """How much of a stored state is restored; by default all of it, into exactly its model."""

    optimizer: bool = True
    """False: the optimizer's state stays as it is."""
    is_strict: bool = True
    """False: parameters that only the store or only the model has are left alone."""
    weights: bool = True
    """False: nothing of the model is looked at; parameters and buffers stay as they are."""


ALL = Wanted()


def optimizer_kinds(stored: Stored) -> dict[str, frozenset[str]]:
    """The optimizer state keys that the store has of each parameter."""
    found: dict[str, set[str]] = defaultdict(set)
    for key in stored:
        if key.kind not in (KIND_MASTER, KIND_WEIGHT, KIND_BUFFER, KIND_BLOB):
            found[key.name].add(key.kind)
    return {name: frozenset(kinds) for name, kinds in found.items()}


def check_parameters(
    stored: Stored, trainable: Shapes, frozen: Shapes, *,
    either: Collection[str] = (), is_strict: bool = True,
) -> None:  # fmt: skip
    """Raise InvalidLayoutError unless the store has exactly these parameters in these shapes.

    Those in `either` may be trained on one side and frozen on the other. Without `is_strict`,
    parameters that only one side has are no reason.
    """
    _check_scopes(stored)
    masters = {key.name: item.shape for key, item in stored.items() if key.kind == KIND_MASTER}
    weights = {
        key.name: item.shape
        for key, item in stored.items()
        if key.kind == KIND_WEIGHT and not key.scope
    }
    for name in either:
        if name in weights and name in trainable:
            masters[name] = weights.pop(name)
    problems = [
        *_compare(masters, trainable, weights, frozen, "trainable"),
        *_compare(weights, frozen, masters, trainable, "frozen"),
    ]
    if not is_strict:
        both = (masters.keys() | weights.keys()) & (trainable.keys() | frozen.keys())
        problems = [problem for problem in problems if problem.partition(": ")[0] in both]
    if problems:
        raise InvalidLayoutError(
            f"the checkpoint is of another model: {len(problems)} differences among "
            f"{len(masters) + len(weights)} stored and {len(trainable) + len(frozen)} live "
            f"parameters\n  {_shown(problems)}"
        )


def check_optimizer(stored: Stored, partitions: Sequence[Partition], optimizer: Any) -> None:
    """Raise InvalidLayoutError unless the stored optimizer state is what this optimizer keeps."""
    kinds = optimizer_kinds(stored)
    masters = {key.name for key in stored if key.kind == KIND_MASTER}
    problems = []
    for partition in partitions:
        rule = rule_for(optimizer, partition.hyper)
        for name in partition.names:
            have = kinds.get(name, frozenset())
            if have == rule.keys or not (have or (rule.is_eager and name in masters)):
                continue
            problems.append(f"{name}: stored {_kinds(have)}, expected {_kinds(rule.keys)}")
    if problems:
        raise InvalidLayoutError(
            f"the checkpoint's optimizer state is not that of {type(optimizer).__name__}: "
            f"{len(problems)} parameters differ\n  {_shown(problems)}"
        )


def check_shape(key: TensorKey, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    """Raise InvalidLayoutError when an elementwise tensor is stored in another shape."""
    if stored.shape != shape:
        raise InvalidLayoutError(f"{key}: stored shape {stored.shape}, here {shape}")


def is_same_dtype(key: TensorKey, stored: StoredTensor, live: torch.dtype) -> bool:
    """Whether no conversion is needed; raises UnsupportedLayoutError where one would round."""
    source = dtype_of(stored.dtype)
    if source == live:
        return True
    is_float = source.is_floating_point and live.is_floating_point
    if not is_float or torch.promote_types(source, live) != live:
        raise UnsupportedLayoutError(
            f"{key}: stored as {stored.dtype}, here {str(live).removeprefix('torch.')}; only "
            f"the same dtype or one that holds every stored value exactly is restored"
        )
    return False


def _compare(
    stored: Shapes, live: Shapes, stored_other: Shapes, live_other: Shapes, word: str
) -> Iterable[str]:
    for name, shape in stored.items():
        if name in live and live[name] != shape:
            yield f"{name}: stored shape {shape}, here {live[name]}"
        elif name in live_other:
            yield f"{name}: stored as {word}, here it is not"
        elif name not in live:
            yield f"{name}: stored with shape {shape}, not in this model"
    for name, shape in live.items():
        if name not in stored and name not in stored_other:
            yield f"{name}: here with shape {shape}, not in the checkpoint"


def overrides(stored: Stored) -> dict[str, list[tuple[Interval, TensorKey]]]:
    """The stored runs of low-precision elements that are not derivable, by parameter."""
    found: dict[str, list[tuple[Interval, TensorKey]]] = defaultdict(list)
    for key in stored:
        elements = scope_elements(key.scope)
        if key.kind == KIND_WEIGHT and elements is not None:
            found[key.name].append((elements, key))
    return found


def _check_scopes(stored: Stored) -> None:
    scoped = [
        str(key)
        for key in stored
        if key.scope and key.kind not in (KIND_BUFFER, KIND_BLOB)
        and not (key.kind == KIND_WEIGHT and scope_elements(key.scope))
    ]  # fmt: skip
    if scoped:
        raise UnsupportedLayoutError(
            f"{len(scoped)} stored tensors belong to a part of the job (tensor, pipeline or expert "
            f"parallel), which this version does not restore\n  {_shown(scoped)}"
        )


def _kinds(kinds: Iterable[str]) -> str:
    return ", ".join(sorted(kinds)) or "nothing"


def _shown(problems: Sequence[str]) -> str:
    rest = len(problems) - SHOWN
    more = [f"and {rest} more"] if rest > 0 else []
    return "\n  ".join([*problems[:SHOWN], *more])
