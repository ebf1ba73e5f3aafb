"""Which of a rank's frozen weights are stored already, told by their content alone.

Nothing else is trusted: `requires_grad` may be toggled, and writes through `.data` leave a tensor's
version counter as it was. So every save reads every frozen byte once, at the speed of memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from spotspeed.core.frozen import ObjectRecord, content_of, groups
from spotspeed.core.layout import Fragment
from spotspeed.staging.devices import ENGINES, Engines
from spotspeed.staging.sources import HostSource, Source, gather

if TYPE_CHECKING:
    import torch

_PIECE_BYTES = 16 * 1024 * 1024
Pieces = Sequence[tuple["Fragment", "torch.Tensor"]]


@dataclass(frozen=True, slots=True)
class Group:
    """Frozen weights that share an object which is not known to be stored."""

    content: str
    fragments: tuple[Fragment, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class FrozenShare:
    """What one save does with the frozen weights of its rank."""

    new: tuple[Group, ...] = ()
    """To be staged and written, each as an object."""
    referred: tuple[ObjectRecord, ...] = ()
    """Stored already; only named in the receipt."""
    fragments: tuple[Fragment, ...] = ()
    sources: tuple[Source, ...] = ()
    """Everything, also what is only referred to."""
    is_small: bool = False
    """Too little for an object: it belongs into the shard."""


def plan_share(
    pieces: Pieces, known: Mapping[str, ObjectRecord], *, engines: Engines = ENGINES,
    after: Any = None,
) -> FrozenShare:  # fmt: skip
    """Digest `pieces` (1-D contiguous tensors of exactly their fragments) and look them up.

    `known` has the objects that this save may refer to, by content. The tensors may not change
    until the save is staged. `engines` and `after` are as for `gather`. Raises CaptureError for a
    tensor that is not its fragment.
    """
    # One dtype after the other, as they will lie in the object: the order is part of the content.
    fragments, sources = gather(
        sorted(pieces, key=lambda piece: piece[0].dtype), {}, engines=engines, after=after
    )
    found = groups([source.size_bytes for source in sources])
    everything = tuple(fragments), tuple(sources)
    if not found:
        return FrozenShare((), (), *everything, is_small=True)
    new: list[Group] = []
    referred: list[ObjectRecord] = []
    for group in found:
        members = tuple(fragments[n] for n in group), tuple(sources[n] for n in group)
        content = content_of(
            (fragment, _digest(source)) for fragment, source in zip(*members, strict=True)
        )
        record = known.get(content)
        if record is None:
            new.append(Group(content, *members))
        else:
            referred.append(record)
    return FrozenShare(tuple(new), tuple(referred), *everything)


def _digest(source: Source) -> bytes:
    """XXH3-128 of a source's bytes; host memory is read in place, and without the GIL."""
    if isinstance(source, HostSource):
        buffer = (ctypes.c_char * source.size_bytes).from_address(source.address)
        return xxhash.xxh3_128_digest(memoryview(buffer).cast("B"))
    hasher = xxhash.xxh3_128()
    bounce = np.empty(min(_PIECE_BYTES, source.size_bytes), dtype=np.uint8)
    for start in range(0, source.size_bytes, len(bounce)):
        piece = bounce[: min(len(bounce), source.size_bytes - start)]
        source.read(piece.ctypes.data, start, len(piece))
        hasher.update(piece.data)
    return hasher.digest()
