"""Logical tensors of the training state, and the pieces of them that a rank holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spotspeed.core.interval import Interval
from spotspeed.errors import InvalidLayoutError

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
    "complex64": 8, "complex128": 16,
}  # fmt: skip
"""Bytes per element of every dtype that the format knows, by torch's name for it."""

KIND_MASTER = "fp32"
"""The optimizer's own copy of the weights, whatever its dtype (the field's name for it)."""
KIND_WEIGHT = "weight"
"""A weight that no master derives: frozen parameters, and low-precision copies that differ."""
KIND_BLOB = "blob"
"""Plain data of the job or of one rank, encoded: a 1-D uint8 tensor that is no parameter's."""
KIND_CLIENT = "client"
"""A large tensor of what the caller saved with the state; its name is a number."""
KIND_BUFFER = "buffer"
"""A module buffer; scope "rank-N" says whose."""


@dataclass(frozen=True, slots=True, order=True)
class TensorKey:
    """Identity of one logical tensor of the training state.

    `kind` is "fp32", "weight", "buffer" or an optimizer state key ("exp_avg", "step", ...);
    `name` is the parameter's full name; `scope` is empty for state shared by all ranks, else says
    which part of the job the tensor belongs to ("tp-0", "rank-3").
    """

    kind: str
    name: str
    scope: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" + (f"@{self.scope}" if self.scope else "")


@dataclass(frozen=True, slots=True)
class Fragment:
    """A contiguous element range of one logical tensor, flattened in row-major order."""

    key: TensorKey
    dtype: str
    shape: tuple[int, ...]
    interval: Interval

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise InvalidLayoutError(f"{self.key}: dtype {self.dtype!r} is not one of the format's")
        if self.interval.count and self.interval.stop > math.prod(self.shape):
            raise InvalidLayoutError(
                f"{self.key}: elements [{self.interval.start}, {self.interval.stop}) are not all "
                f"inside shape {self.shape}"
            )

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def size_bytes(self) -> int:
        return self.interval.count * self.item_bytes

    def narrow(self, interval: Interval) -> Fragment:
        """The same tensor's fragment over `interval`."""
        return Fragment(self.key, self.dtype, self.shape, interval)


@dataclass(frozen=True, slots=True)
class Holding:
    """A fragment that this rank holds, as replica `replica_index` of `replica_count` equal ones."""

    fragment: Fragment
    replica_index: int = 0
    replica_count: int = 1

    @property
    def share(self) -> Fragment:
        """The part this rank writes, so that the replicas together write the fragment once."""
        if self.replica_count == 1:
            return self.fragment
        return self.fragment.narrow(
            self.fragment.interval.split(self.replica_count, self.replica_index)
        )


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a shard holds a range of a tensor: `raw_offset` bytes into shard `shard`'s stream."""

    interval: Interval
    shard: int
    raw_offset: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One logical tensor of a checkpoint; its extents are disjoint and ordered."""

    dtype: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
