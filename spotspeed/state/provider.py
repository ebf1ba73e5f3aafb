"""The live training state of an engine as named fragments, whatever optimizer holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import deepspeed
import torch

from spotspeed.core.layout import KIND_MASTER, StoredTensor, TensorKey
from spotspeed.errors import CaptureError, UnsupportedLayoutError
from spotspeed.state import scaler
from spotspeed.state.bf16 import Bf16Layout
from spotspeed.state.buffers import transient_buffers
from spotspeed.state.capture import expected_bytes, live_pieces, underived_pieces
from spotspeed.state.fit import ALL, Wanted, check_optimizer, check_parameters
from spotspeed.state.fp16_fused import FusedLayout
from spotspeed.state.fp16_unfused import UnfusedLayout
from spotspeed.state.mesh import (
    Gather,
    alone,
    describe_parameters,
    is_divided,
    mesh_of,
    on_every_rank,
)
from spotspeed.state.optimizers import rule_for
from spotspeed.state.parameters import ParameterNames, count_of, shape_of
from spotspeed.state.partition import Layout
from spotspeed.state.piece import Piece, dtype_name
from spotspeed.state.probe import SUPPORTED, moves_during_forward, refuse_unsupported
from spotspeed.state.replicated import ReplicatedLayout
from spotspeed.state.restore import Restore
from spotspeed.state.zero3 import Zero3Layout
from spotspeed.state.zero12 import Zero12Layout

__all__ = ["Piece", "StateProvider", "provider_for"]


class StateProvider(Protocol):
    """Describes one engine's state; nothing is cached, so every call sees the state as it is."""

    @property
    def name(self) -> str:
        """The layout: zero1, zero2, zero3, bf16, stage0, stage0-unfused or stage0-fused."""
        ...

    def pieces(self) -> list[Piece]:
        """Masters, optimizer state and frozen weights that this rank holds; no communication.

        The shares of all ranks together cover each tensor exactly once. Valid until the next
        optimizer step begins. Raises CaptureError, naming the key, for state that is not known.
        """
        ...

    def derived_mismatches(self) -> list[Piece]:
        """The low-precision weights on this rank that are not their master, rounded.

        They are of kind "weight" and a scope "elements-START-STOP", each a whole tensor of that
        many elements, and need to be stored beside `pieces`. Costs one pass over the masters; it
        may run on another thread until the next optimizer step begins.
        """
        ...

    def expected_bytes(self) -> int:
        """The bytes of this rank's shares of `pieces`, once the optimizer has made its state."""
        ...

    def prepare_restore(
        self, stored: Mapping[TensorKey, StoredTensor], wanted: Wanted = ALL
    ) -> list[Piece]:
        """The targets that this rank has to fill, in place, to hold the stored state.

        Allocates missing optimizer state. Raises InvalidLayoutError, before it changes anything,
        when parameters or optimizer differ, and UnsupportedLayoutError for an inexact dtype.
        """
        ...

    def check_restore(self) -> None:
        """Raise InvalidLayoutError when the filled targets cannot be applied.

        Local: to be called when all targets are filled, before the ranks agree to finish.
        """
        ...

    def finish_restore(self) -> None:
        """Make the filled targets the live state; collective: every rank calls it, or none."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the state belongs to, as plain data; the same on all ranks."""
        ...

    def aliases(self) -> dict[str, str]:
        """Further names of tied parameters, with the name that their state is stored under."""
        ...

    def source_rank(self, model: Mapping[str, Any], world_size: int) -> int:
        """The old rank whose buffers and generators this rank takes over.

        `model` is what `describe` gave when `world_size` ranks wrote the state. Raises
        InvalidLayoutError when pipelines or experts divided the model otherwise than now.
        """
        ...

    def group_names(self) -> list[list[str]]:
        """The parameters of each live param_group, by name and in order."""
        ...

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The live param_groups that `group_names` describes; their values may be changed."""
        ...


_LAYOUTS: dict[str, type[Any]] = {
    "DeepSpeedZeroOptimizer": Zero12Layout,
    "DeepSpeedZeroOptimizer_Stage3": Zero3Layout,
    "BF16_Optimizer": Bf16Layout,
    "FP16_Optimizer": FusedLayout,
    "FP16_UnfusedOptimizer": UnfusedLayout,
}


def provider_for(engine: Any, gather: Gather = alone) -> StateProvider:
    """The provider of an initialised engine, after probing that all it reads is there.

    Where pipelines, experts or AutoTP divide the model, every rank calls it, and it needs `gather`.
    Raises UnsupportedLayoutError naming what was found and what is supported; there on every rank,
    also when one rank alone found it.
    """
    if is_divided(engine):
        return EngineState(engine, on_every_rank(gather, lambda: _layout_of(engine)), gather)
    return EngineState(engine, _layout_of(engine), gather)


def _layout_of(engine: Any) -> Layout:
    """The layout of an engine that is supported; local."""
    refuse_unsupported(engine)
    kind = type(engine.optimizer)
    layout: Layout
    if kind.__module__.startswith("deepspeed.runtime.") and kind.__name__ in _LAYOUTS:
        layout = _LAYOUTS[kind.__name__](engine)
    elif isinstance(engine.optimizer, torch.optim.Optimizer):
        layout = ReplicatedLayout(engine)
    else:
        raise UnsupportedLayoutError(
            f"not supported: {kind.__module__}.{kind.__qualname__} as the engine's optimizer; "
            f"{SUPPORTED}"
        )
    for group in layout.optimizer.param_groups:
        rule_for(layout.optimizer, group)
    return layout


class EngineState:
    """The StateProvider of one engine, whose layout says where everything lies."""

    def __init__(self, engine: Any, layout: Layout, gather: Gather) -> None:
        self._engine, self._layout = engine, layout
        self._names = ParameterNames(engine)
        self._restore: Restore | None = None
        self._master_dtype: str | None = None
        self._mesh = mesh_of(engine, self._trained(layout.group_names()), gather)

    @property
    def name(self) -> str:
        return self._layout.name

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._layout.optimizer.param_groups
        return groups

    def pieces(self) -> list[Piece]:
        self._check_in_place()
        return [piece for piece in live_pieces(self._layout) if self._writes(piece)]

    def expected_bytes(self) -> int:
        return expected_bytes(self._layout, but=self._mesh.foreign)

    def derived_mismatches(self) -> list[Piece]:
        self._check_in_place()
        return [piece for piece in underived_pieces(self._layout) if self._writes(piece)]

    def prepare_restore(
        self, stored: Mapping[TensorKey, StoredTensor], wanted: Wanted = ALL
    ) -> list[Piece]:
        moved = self._offloaded()
        if moved:
            raise UnsupportedLayoutError(
                f"{moved} are offloaded: call engine.reload_states() before restoring"
            )
        either = frozenset[str]()
        if isinstance(self._layout, ReplicatedLayout):
            either = self._layout.expect(key.name for key in stored if key.kind == KIND_MASTER)
        partitions = self._layout.partitions()
        trained = {name for partition in partitions for name in partition.names}
        shapes = {
            name: shape_of(parameter) for name, parameter in self._names if count_of(parameter)
        }
        for name, facts in self._mesh.parameters.items():
            if name not in shapes and math.prod(facts["shape"]):
                shapes[name] = tuple(facts["shape"])
                trained |= {name} if facts["trained"] else set()
        check_parameters(
            stored,
            {name: shape for name, shape in shapes.items() if name in trained},
            {name: shape for name, shape in shapes.items() if name not in trained},
            either=either, is_strict=wanted.is_strict,
        )  # fmt: skip
        if wanted.optimizer:
            check_optimizer(stored, partitions, self._layout.optimizer)
        self._restore = Restore(self._layout, stored, wanted)
        self._restore.plan()
        return list(self._restore.pieces)

    def check_restore(self) -> None:
        assert self._restore is not None, "prepare_restore comes first"
        self._restore.check()

    def finish_restore(self) -> None:
        restore, self._restore = self._restore, None
        assert restore is not None, "prepare_restore comes first"
        restore.finish()

    def describe(self) -> dict[str, Any]:
        groups = self.group_names()
        trained = self._trained(groups)
        if self._master_dtype is None and trained:
            self._master_dtype = dtype_name(self._layout.partitions()[0].master)
        return {
            "provider": self.name,
            "deepspeed": deepspeed.__version__,
            "zero_stage": int(self._engine.zero_optimization_stage()),
            "optimizer": type(self._layout.optimizer).__name__,
            "master_dtype": self._master_dtype,
            "parameters": {
                **self._mesh.parameters,
                **describe_parameters(self._names, trained),
            },
            "mesh": self._mesh.describe(),
            "groups": groups,
            "aliases": self.aliases(),
            "round_robin": bool(getattr(self._engine.optimizer, "round_robin_gradients", False)),
            "loss_scale": scaler.settings(self._engine),
            "transient_buffers": transient_buffers(self._engine.module),
        }

    def aliases(self) -> dict[str, str]:
        return {**self._mesh.aliases, **self._names.aliases()}

    def source_rank(self, model: Mapping[str, Any], world_size: int) -> int:
        rank = int(self._engine.global_rank)
        return self._mesh.source_rank(rank, model.get("mesh"), world_size)

    def group_names(self) -> list[list[str]]:
        return self._layout.group_names()

    def _trained(self, groups: list[list[str]]) -> frozenset[str]:
        """The parameters in the groups that the optimizer does update."""
        kept = {resident.name for resident in self._layout.residents()}
        empty = {name for name, parameter in self._names if not count_of(parameter)}
        return frozenset(name for group in groups for name in group) - kept - empty

    def _writes(self, piece: Piece) -> bool:
        """Whether this rank stores its share: tied weights are stored by one stage."""
        return piece.fragment.key.name not in self._mesh.foreign

    def _check_in_place(self) -> None:
        """Raise CaptureError when the state is elsewhere, or moves while training goes on."""
        moved = self._offloaded()
        if moved:
            raise CaptureError(f"{moved} are offloaded: call engine.reload_states() first")
        if moves_during_forward(self._engine.optimizer):
            raise CaptureError(
                "engine.compile() was given a schedule with DeepCompile's pass move_opt_states, "
                "which moves the optimizer's state during forward and backward: it cannot be "
                "copied meanwhile; leave that pass out"
            )

    def _offloaded(self) -> str:
        """What `engine.offload_states()` has moved away, in words."""
        moved = getattr(self._engine.optimizer, "offloaded_states", ())
        return ", ".join(sorted(str(getattr(state, "value", state)) for state in moved))
