"""The part of a model that a rank trains where it is divided: by pipelines, experts or AutoTP.

Each rank has a *part* (its stage, its experts, its shards) and a number among the replicas of that
part. Fragments carry names of the whole model, so a state does not depend on the number of
replicas; what is stored by rank (buffers, hyper-parameters) is taken over from a rank of the same
part. The degrees themselves are fixed: another degree is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from deepspeed.moe.layer import MoE

from spotspeed import errors
from spotspeed.errors import FormatError, InvalidLayoutError, SpotSpeedError
from spotspeed.state.parameters import (
    TENSOR,
    ParameterNames,
    replica_of,
    shape_of,
    tensor_place,
)
from spotspeed.state.piece import dtype_name

T = TypeVar("T")
Gather = Callable[[Any], list[Any]]
"""Every rank's plain JSON value, in order of rank; never by the training's communicators."""


def alone(mine: Any) -> list[Any]:
    """The `Gather` of a rank that asks nobody, where nothing is divided."""
    return [mine]


PIPELINE, EXPERT = "pipeline", "expert"


@dataclass(frozen=True, slots=True)
class Mesh:
    """The job's degrees, every rank's place, and the model of all parts together.

    `places[rank]` is (part, replica); empty where every rank trains the whole model, as
    `parameters` and `aliases` are then. `foreign` are the tied parameters of this rank that a lower
    stage of the pipeline has as well, and writes.
    """

    degrees: Mapping[str, str] = field(default_factory=dict)
    places: tuple[tuple[str, int], ...] = ()
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    foreign: frozenset[str] = frozenset()

    def describe(self) -> dict[str, Any] | None:
        """Degrees and places as plain data; None where nothing is divided."""
        if not self.degrees:
            return None
        return {"degrees": dict(self.degrees), "places": [list(place) for place in self.places]}

    def source_rank(self, rank: int, stored: Mapping[str, Any] | None, world_size: int) -> int:
        """The rank among the `world_size` old ones whose own state this rank takes over.

        `stored` is what `describe` gave then. Raises InvalidLayoutError when the model was divided
        otherwise, FormatError when `stored` does not tell the places of all old ranks.
        """
        degrees = {} if stored is None else stored.get("degrees")
        if degrees != dict(self.degrees):
            raise InvalidLayoutError(
                f"the checkpoint was written with {_in_words(degrees)}, this job has "
                f"{_in_words(self.degrees)}: only the number of data-parallel replicas may change; "
                f"start it with the degrees of the checkpoint"
            )
        if stored is None:
            return rank % world_size
        places = stored.get("places", ())
        part, replica = self.places[rank]
        found = sorted((place[1], old) for old, place in enumerate(places) if place[0] == part)
        if len(places) != world_size or not found:
            raise FormatError(
                f"the checkpoint tells the places of {len(places)} of its {world_size} ranks, "
                f"{len(found)} of them with the part {part}"
            )
        return found[replica % len(found)][1]


@dataclass(frozen=True, slots=True)
class _Card:
    """What one rank tells the others about its part."""

    place: tuple[str, int]
    stage: int
    parameters: dict[str, dict[str, Any]]
    aliases: dict[str, str]


def is_divided(engine: Any) -> bool:
    """Whether pipelines, experts or AutoTP divide the model among the ranks; local."""
    return bool(_degrees(engine))


def on_every_rank(gather: Gather, action: Callable[[], T]) -> T:
    """This rank's result of `action`; the first rank's SpotSpeedError on every rank if any raised.

    Collective: what comes after it is only reached by all ranks or by none.
    """
    objection: list[str] | None = None
    try:
        result = action()
    except SpotSpeedError as error:
        objection = [type(error).__name__, str(error)]
    for rank, found in enumerate(gather(objection)):
        if found is not None:
            raise getattr(errors, found[0], SpotSpeedError)(f"rank {rank}: {found[1]}")
    return result


def mesh_of(engine: Any, trained: frozenset[str], gather: Gather) -> Mesh:
    """The mesh of an engine; every rank calls it. `gather` is used where the model is divided.

    `trained` are the parameters of this rank that an optimizer updates.
    """
    degrees = _degrees(engine)
    if not degrees:
        return Mesh()
    names = ParameterNames(engine)
    coordinates = _coordinates(engine)
    part = ",".join(f"{axis}-{index}" for axis, index in coordinates)
    replica, stage = _replica(engine), dict(coordinates).get(PIPELINE, 0)
    described = describe_parameters(names, trained) if replica == 0 else {}
    own = _Card((part, replica), stage, described, names.aliases() if replica == 0 else {})
    gathered = [_card_of(card) for card in gather(asdict(own))]
    cards = sorted(gathered, key=lambda card: card.stage)
    parameters: dict[str, dict[str, Any]] = {}
    aliases: dict[str, str] = {}
    for card in cards:
        for name, facts in card.parameters.items():
            parameters.setdefault(name, facts)
        aliases |= card.aliases
    below = {name for card in cards if card.stage < stage for name in card.parameters}
    foreign = frozenset(name for name, _ in names if name in below)
    places = tuple(card.place for card in gathered)
    return Mesh(degrees, places, parameters, aliases, foreign)


def _card_of(raw: Mapping[str, Any]) -> _Card:
    part, replica = raw["place"]
    return _Card((part, replica), raw["stage"], raw["parameters"], raw["aliases"])


def describe_parameters(
    names: ParameterNames, trained: frozenset[str]
) -> dict[str, dict[str, Any]]:
    """The parameters of this rank by name, as plain data."""
    return {
        name: {
            "shape": list(shape_of(parameter)),
            "dtype": dtype_name(parameter),
            "trained": name in trained,
        }
        for name, parameter in names
    }


def _degrees(engine: Any) -> dict[str, str]:
    found = {}
    if getattr(engine, "pipeline_parallelism", False) and engine.grid.pipe_parallel_size > 1:
        found[PIPELINE] = str(engine.grid.pipe_parallel_size)
    tensor = tensor_place(engine)
    if tensor is not None:
        found[TENSOR] = str(tensor[1])
    sizes = sorted({size for size, _ in _expert_places(engine)})
    if sizes:
        found[EXPERT] = "+".join(map(str, sizes))
    return found


def _coordinates(engine: Any) -> list[tuple[str, int]]:
    found = []
    if getattr(engine, "pipeline_parallelism", False):
        found.append((PIPELINE, int(engine.grid.get_stage_id())))
    tensor = tensor_place(engine)
    if tensor is not None:
        found.append((TENSOR, tensor[0]))
    return found + [(f"{EXPERT}-{size}", rank) for size, rank in _expert_places(engine)]


def _expert_groups(engine: Any) -> list[str]:
    """The groups of ranks that divide the experts of this engine (DeepSpeed knows all engines')."""
    if not getattr(engine, "has_moe_layers", False):
        return []
    modules = engine.module.modules()
    return sorted({module.expert_group_name for module in modules if isinstance(module, MoE)})


def _expert_places(engine: Any) -> list[tuple[int, int]]:
    """(size, this rank's index) of each group that divides experts, smallest first."""
    groups = (replica_of(engine.expert_parallel_group[name]) for name in _expert_groups(engine))
    return sorted((size, rank) for rank, size in groups if size > 1)


def _replica(engine: Any) -> int:
    """This rank's number among those with the same part."""
    places = _expert_places(engine)
    if not places:
        return replica_of(engine.seq_data_parallel_group)[0]
    largest = f"ep_size_{places[-1][0]}"
    return replica_of(engine.expert_data_parallel_group[largest])[0]


def _in_words(degrees: Any) -> str:
    items = sorted(dict(degrees or {}).items())
    return " and ".join(f"{axis} parallelism {size}" for axis, size in items) or (
        "no pipeline and no expert parallelism"
    )
