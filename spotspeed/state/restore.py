"""One restore: what to fill, and how the filled targets become the live training state.

Nothing is rebound: DeepSpeed holds views of its flat tensors in many places, so every tensor that
exists is written in place, and only missing optimizer state is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from spotspeed.core.interval import Interval
from spotspeed.core.layout import KIND_MASTER, KIND_WEIGHT, Fragment, Holding, TensorKey
from spotspeed.errors import InvalidLayoutError
from spotspeed.state.fit import (
    ALL,
    Stored,
    Wanted,
    check_shape,
    is_same_dtype,
    optimizer_kinds,
    overrides,
)
from spotspeed.state.optimizers import (
    Rule,
    ScalarTarget,
    empty_like,
    forget,
    rule_for,
    store_scalar,
)
from spotspeed.state.partition import Layout, Partition, Resident, Slot
from spotspeed.state.piece import (
    Piece,
    dtype_name,
    dtype_of,
    flat_elements,
    run_of,
    write_elements,
)
from spotspeed.state.weights import derive_weights, override_weights


@dataclass(slots=True)
class _Scalar:
    """A number of one master's state, read for each parameter that shares the master."""

    partition: Partition
    key: str
    rule: Rule
    values: dict[str, torch.Tensor]


@dataclass(slots=True)
class Restore:
    """The targets of one restore of a state that fits; call `finish` when all are filled.

    Targets are views of the live tensors where these are in host memory, contiguous and of the
    stored dtype; else they are host buffers that `finish` copies from.

    Planning allocates the optimizer state that is missing and clears the state of masters that
    the store has none for, so that they end up as if never stepped.
    """

    layout: Layout
    stored: Stored
    wanted: Wanted = ALL
    pieces: list[Piece] = field(default_factory=list)
    _copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _scalars: list[_Scalar] = field(default_factory=list)
    _overrides: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def plan(self) -> None:
        """Collect `pieces`; raises ReshardError for a tensor that cannot be filled."""
        kinds, runs = optimizer_kinds(self.stored), overrides(self.stored)
        with torch.no_grad():
            for partition in self.layout.partitions():
                if self.wanted.optimizer:
                    self._plan_state(partition, kinds)
                for slot in partition.slots:
                    if TensorKey(KIND_MASTER, slot.name) not in self.stored:
                        if TensorKey(KIND_WEIGHT, slot.name) in self.stored:
                            # Frozen there.
                            self._add(KIND_WEIGHT, slot, partition.master, partition)
                        continue  # The fit was checked: only what is not strict lacks both.
                    self._add(KIND_MASTER, slot, partition.master, partition)
                    self._plan_override(slot, runs.get(slot.name, []))
            for resident in self.layout.residents():
                if TensorKey(KIND_WEIGHT, resident.name) not in self.stored:
                    continue
                slot = Slot(resident.name, resident.shape, resident.interval, 0)
                self._add(KIND_WEIGHT, slot, resident.tensor, resident)

    def check(self) -> None:
        """Raise InvalidLayoutError when the filled numbers cannot be applied; local."""
        for scalar in self._scalars:
            _check_equal(scalar, self.layout.name)

    def finish(self) -> None:
        """Apply what could not be filled in place and derive what is not stored; collective."""
        self.check()
        with torch.no_grad():
            for live, elements in self._copies:
                write_elements(live, elements)
            for scalar in self._scalars:
                self._store_scalar(scalar)
            partitions = self.layout.partitions()
            derive_weights(partitions)
            override_weights(partitions, self._overrides)
            self.layout.share_weights()
            self.layout.relink()

    def _plan_state(self, partition: Partition, kinds: dict[str, frozenset[str]]) -> None:
        optimizer = self.layout.optimizer
        with_state = [name for name in partition.names if kinds.get(name)]
        if not with_state:
            if partition.swapped is not None:
                partition.swapped.drop()
            forget(optimizer, partition.key, partition.hyper)
            return
        rule, state = rule_for(optimizer, partition.hyper), optimizer.state[partition.key]
        if partition.swapped is not None:
            partition.swapped.make(rule.elementwise)
            state = partition.state_in(optimizer)
        for kind in rule.elementwise:
            own = partition.own.get(kind)
            if own is not None and not own.count:
                continue
            if state.get(kind) is None and own is not None:
                device = partition.master.device
                state[kind] = torch.zeros(own.count, dtype=own.dtype, device=device)
            elif state.get(kind) is None:
                state[kind] = empty_like(partition.master, optimizer, partition.slots)
            for slot in partition.slots if own is None else own.needed:
                if kind in kinds.get(slot.name, ()):
                    self._add(kind, slot, state[kind], partition)
                else:
                    run_of(flat_elements(state[kind]), slot.offset, slot.interval).zero_()
        held = [slot.name for slot in partition.slots if kinds.get(slot.name)]
        for kind in rule.scalars:
            names = held or with_state
            values = {name: self._add_scalar(TensorKey(kind, name), partition) for name in names}
            self._scalars.append(_Scalar(partition, kind, rule, values))

    def _plan_override(self, slot: Slot, runs: list[tuple[Interval, TensorKey]]) -> None:
        """Ask for the stored low-precision elements of a slot that its master does not give."""
        for elements, key in runs:
            item, common = self.stored[key], elements.intersect(slot.interval)
            is_other = slot.weight is None or item.dtype != dtype_name(slot.weight)
            if common is None or is_other:
                continue  # The low-precision copy of another dtype says nothing about this one.
            check_shape(key, item, (elements.count,))
            part = torch.empty(common.count, dtype=dtype_of(item.dtype))
            fragment = Fragment(key, item.dtype, item.shape, common.shift(-elements.start))
            self.pieces.append(Piece(Holding(fragment), part))
            self._overrides[slot.name, common.start] = part

    def _add(self, kind: str, slot: Slot, live: torch.Tensor, owner: Partition | Resident) -> None:
        """Ask for a slot of a stored tensor, to end up in the same slot of `live`."""
        key = TensorKey(kind, slot.name)
        item = self.stored[key]
        check_shape(key, item, slot.shape)
        is_same = is_same_dtype(key, item, live.dtype)
        if live.is_contiguous():
            live = run_of(flat_elements(live), slot.offset, slot.interval)
        if is_same and live.is_contiguous():
            elements = live.view(-1)
        else:
            elements = torch.empty(slot.interval.count, dtype=dtype_of(item.dtype))
            self._copies.append((live, elements))
        fragment = Fragment(key, item.dtype, slot.shape, slot.interval)
        self.pieces.append(Piece(_held(fragment, owner), elements))

    def _add_scalar(self, key: TensorKey, owner: Partition) -> torch.Tensor:
        """Ask for one number; it stays in the stored dtype until `finish`."""
        item = self.stored[key]
        check_shape(key, item, ())
        value = torch.empty(1, dtype=dtype_of(item.dtype))
        fragment = Fragment(key, item.dtype, (), Interval(0, 1))
        self.pieces.append(Piece(_held(fragment, owner), value))
        return value

    def _store_scalar(self, scalar: _Scalar) -> None:
        partition = scalar.partition
        state = self.layout.optimizer.state[partition.key]
        target = ScalarTarget.of(partition.master, partition.hyper)
        value = next(iter(scalar.values.values()))
        store_scalar(state, scalar.key, value, scalar.rule, target)


def _held(fragment: Fragment, owner: Partition | Resident) -> Holding:
    """A target, with how many ranks have the same one to fill."""
    return Holding(fragment, owner.replica_index, owner.replica_count)


def _check_equal(scalar: _Scalar, layout: str) -> None:
    numbers = [(name, value.item()) for name, value in scalar.values.items()]
    first, number = numbers[0]
    for name, other in numbers:
        if other != number:
            raise InvalidLayoutError(
                f"{scalar.key}: {number!r} for {first}, {other!r} for {name}; here both share one "
                f"optimizer state ({layout}), which has one number: resume with ZeRO stage 0, as "
                f"the checkpoint was written"
            )
