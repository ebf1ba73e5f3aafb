"""A sealed checkpoint without an engine: its parameters by name, as numpy arrays."""

from __future__ import annotations

import difflib
import functools
import os
from typing import Any

import numpy as np

from spotspeed.checkpoint.catalog import CheckpointInfo, find, list_sealed
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.core.layout import (
    KIND_BLOB,
    KIND_BUFFER,
    KIND_CLIENT,
    KIND_MASTER,
    KIND_WEIGHT,
    TensorKey,
)
from spotspeed.core.manifest import Manifest
from spotspeed.errors import InvalidLayoutError
from spotspeed.storage import open_storage

_NOT_THE_MODEL = (KIND_BLOB, KIND_CLIENT)
_KIND_ORDER = (KIND_MASTER, KIND_WEIGHT, KIND_BUFFER)


class OpenedCheckpoint:
    """Logical tensors of one checkpoint, whatever number of ranks wrote it.

    Everything read is verified; damage is CorruptionError naming the file.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    @property
    def tag(self) -> str:
        return self._reader.manifest.ticket.tag

    @property
    def step(self) -> int:
        """Optimizer updates completed."""
        return self._reader.manifest.ticket.step

    @property
    def world_size(self) -> int:
        """Number of ranks that wrote it."""
        return self._reader.manifest.ticket.world_size

    @property
    def manifest(self) -> Manifest:
        return self._reader.manifest

    @property
    def reader(self) -> CheckpointReader:
        """The reader underneath: any fragment, into any buffer."""
        return self._reader

    def parameters(self) -> list[str]:
        """Names of all parameters, sorted; frozen ones included, buffers not."""
        return sorted({key.name for key in self._reader.tensors()
                       if key.kind not in (KIND_BUFFER, *_NOT_THE_MODEL)})  # fmt: skip

    def kinds(self, name: str) -> list[str]:
        """What is stored of `name`: "fp32" and "weight" first, then the optimizer's states."""
        kinds = set(self._stored.get(name, ()))
        if not kinds:
            raise self._unknown(f"parameter {name!r}", name, set(self._stored))
        return [kind for kind in _KIND_ORDER if kind in kinds] + sorted(kinds - {*_KIND_ORDER})

    def scopes(self, name: str, kind: str) -> list[str]:
        """The scopes under which (name, kind) is stored; [""] for what all ranks share."""
        return sorted(self._stored.get(name, {}).get(kind, ()))

    def shape(self, name: str, kind: str, *, scope: str | None = None) -> tuple[int, ...]:
        """Shape of the logical tensor."""
        return self._reader.tensors()[self._find(name, kind, scope)].shape

    def dtype(self, name: str, kind: str, *, scope: str | None = None) -> str:
        """torch's name of the stored type ("float32", "bfloat16", ...)."""
        return self._reader.tensors()[self._find(name, kind, scope)].dtype

    def read(
        self, name: str, kind: str, start: int = 0, stop: int | None = None, *,
        scope: str | None = None,
    ) -> np.ndarray[Any, Any]:  # fmt: skip
        """One logical tensor in its shape, or its flattened elements [start, stop).

        Only the chunks that hold these elements are read. bfloat16 and the float8 types, which
        numpy lacks, come as float32 with exactly the same values. `scope` is needed only where
        several ranks stored their own ("rank-0", ...). Raises InvalidLayoutError when there is no
        such tensor or range, saying what there is.
        """
        return self._reader.read_tensor(self._find(name, kind, scope), start, stop)

    @functools.cached_property
    def _stored(self) -> dict[str, dict[str, list[str]]]:
        """Name to kind to scopes, of the model; a sealed checkpoint does not change."""
        stored: dict[str, dict[str, list[str]]] = {}
        for key in self._reader.tensors():
            if key.kind not in _NOT_THE_MODEL:
                stored.setdefault(key.name, {}).setdefault(key.kind, []).append(key.scope)
        return stored

    def _find(self, name: str, kind: str, scope: str | None) -> TensorKey:
        kinds = self.kinds(name)
        if kind not in kinds:
            raise self._unknown(f"{kind!r} of {name}", kind, set(kinds))
        scopes = self.scopes(name, kind)
        if scope is None and len(scopes) > 1:
            raise InvalidLayoutError(
                f"{kind} of {name} is stored {len(scopes)} times: pass scope= one of "
                f"{', '.join(scopes[:8])}"
            )
        chosen = scopes[0] if scope is None else scope
        if chosen not in scopes:
            raise self._unknown(f"{kind} of {name} in scope {scope!r}", chosen, set(scopes))
        return TensorKey(kind, name, chosen)

    def _unknown(self, what: str, word: str, there: set[str]) -> InvalidLayoutError:
        near = difflib.get_close_matches(word, sorted(there), n=3) or sorted(there)[:5]
        return InvalidLayoutError(
            f"checkpoint {self.tag} holds no {what}; it holds {', '.join(map(repr, near)) or '-'}"
            + (f" and {len(there) - len(near)} more" if len(there) > len(near) else "")
        )


def open_checkpoint(path: str | os.PathLike[str], tag: str | None = None) -> OpenedCheckpoint:
    """The newest checkpoint at `path` (a directory or an fsspec URL), or the one tagged `tag`.

    Raises ObjectNotFoundError when there is none, CorruptionError when its manifest is damaged.
    """
    storage = open_storage(path)
    info = find(storage, tag)
    return OpenedCheckpoint(CheckpointReader.open(storage, info.directory, digest=info.digest))


def list_checkpoints(path: str | os.PathLike[str]) -> list[CheckpointInfo]:
    """The sealed checkpoints at `path`, newest first."""
    return list_sealed(open_storage(path))
