"""What a checkpoint says of the model it is of: parameters, ties and buffers by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.core import plain
from spotspeed.core.layout import (
    KIND_BLOB,
    KIND_BUFFER,
    KIND_MASTER,
    KIND_WEIGHT,
    StoredTensor,
    TensorKey,
)
from spotspeed.errors import FormatError, UnsupportedLayoutError

_JOB = TensorKey(KIND_BLOB, "job")


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the module's state: where its numbers are stored, and its own dtype.

    `source` is the master, the frozen weight or the buffer; None for a tensor without elements.
    `dtype` is what the module keeps it in. `overrides` are stored runs of elements that are not
    the rounded master, by their first element.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: TensorKey | None
    overrides: Mapping[int, TensorKey]
    is_buffer: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """The module whose training state a checkpoint holds."""

    weights: tuple[Weight, ...]
    aliases: Mapping[str, str]
    """Further names of tied parameters, with the name in `weights`."""
    job: Mapping[str, Any]
    """The job's plain data, not converted to torch's types."""


def read_model(reader: CheckpointReader) -> Model:
    """The module's parameters in its own order, then its persistent buffers.

    The buffers are those of rank 0, or of the first rank of each pipeline stage. Frozen parameters
    that the save was told to exclude are not among them.

    Raises FormatError when the checkpoint does not describe its model, or contradicts itself;
    UnsupportedLayoutError for buffers inside of experts that several ranks hold.
    """
    ticket = reader.manifest.ticket
    job = plain.decode(reader.blob(_JOB), source=f"{ticket.directory}: job")
    model = job.get("model") if isinstance(job, dict) else None
    try:
        parameters, aliases = dict(model["parameters"]), dict(model["aliases"])  # type: ignore[index]
        transient = frozenset(model.get("transient_buffers", ()))  # type: ignore[union-attr]
        weights = [
            _parameter(reader.tensors(), name, said)
            for name, said in parameters.items()
            if not _is_left_out(reader.tensors(), name, said)
        ]
    except (TypeError, KeyError, ValueError) as error:
        raise FormatError(
            f"{ticket.directory}: the job's description of its model is missing or incomplete "
            f"({type(error).__name__}: {error})"
        ) from error
    scopes, taken = _buffer_scopes(model), set[str]()
    for key, stored in sorted(reader.tensors().items()):
        if key.kind != KIND_BUFFER or key.scope not in scopes or key.name in transient:
            continue
        if len(scopes) > 1 and ".deepspeed_experts." in key.name:
            raise UnsupportedLayoutError(
                f"{ticket.directory}: buffer {key.name} is of an expert whose number in the job "
                f"is not stored; load it with spotspeed instead"
            )
        if key.name not in taken:
            taken.add(key.name)
            weights.append(Weight(key.name, stored.shape, stored.dtype, key, {}, is_buffer=True))
    return Model(tuple(weights), aliases, job)


def _is_left_out(
    tensors: Mapping[TensorKey, StoredTensor], name: str, said: Mapping[str, Any]
) -> bool:
    """Whether a frozen parameter with elements is not stored."""
    return (
        not said["trained"]
        and 0 not in said["shape"]
        and TensorKey(KIND_WEIGHT, name) not in tensors
    )


def _buffer_scopes(model: Any) -> frozenset[str]:
    """The scopes of the ranks whose buffers are the model's: the first rank of each part."""
    places = (model.get("mesh") or {}).get("places") or [["", 0]]
    first: dict[str, int] = {}
    for rank, (part, _) in enumerate(places):
        first.setdefault(str(part), rank)
    return frozenset(f"rank-{rank}" for rank in first.values())


def _parameter(
    tensors: Mapping[TensorKey, StoredTensor], name: str, said: Mapping[str, Any]
) -> Weight:
    shape, dtype = tuple(said["shape"]), str(said["dtype"])
    master, frozen = TensorKey(KIND_MASTER, name), TensorKey(KIND_WEIGHT, name)
    source = next((key for key in (master, frozen) if key in tensors), None)
    if source is None and 0 not in shape:
        raise FormatError(f"parameter {name} of shape {shape} is described but not stored")
    if source is not None and tensors[source].shape != shape:
        raise FormatError(f"{source}: stored as {tensors[source].shape}, described as {shape}")
    overrides = {
        int(key.scope.split("-")[1]): key for key in tensors
        if key.kind == KIND_WEIGHT and key.name == name and key.scope.startswith("elements-")
    }  # fmt: skip
    return Weight(name, shape, dtype, source, overrides)
