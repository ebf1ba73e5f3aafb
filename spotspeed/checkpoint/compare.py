"""Compares two checkpoints bit by bit, whatever numbers of ranks wrote them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.core import plain
from spotspeed.core.interval import Interval
from spotspeed.core.layout import ITEM_BYTES, KIND_BLOB, Fragment, StoredTensor, TensorKey
from spotspeed.errors import FormatError

RUN_BYTES = 32 * 1024 * 1024
"""Bytes of each checkpoint that are held at a time."""
_JOB = TensorKey(KIND_BLOB, "job")
_JOB_PARTS = ("step", "seed", "counters", "schedule", "groups", "scaler", "cursor", "client_state")


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not the same, and how, in words."""

    what: str
    how: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """How much was compared, and every difference, tensors in order of their names."""

    tensors: int
    size_bytes: int
    differences: tuple[Difference, ...]

    @property
    def is_same(self) -> bool:
        return not self.differences


def compare(first: CheckpointReader, second: CheckpointReader) -> Comparison:
    """Compare all tensors, the job's state, and the random generators of ranks that both have.

    What tells launches apart but not states (tags, times, layouts) is left out. Everything read is
    verified. Raises CorruptionError when either is damaged.
    """
    ours, theirs = first.tensors(), second.tensors()
    found: list[Difference] = []
    count = size_bytes = 0
    # A number that belongs to one rank is compared only where both jobs had that rank.
    ranks = min(r.manifest.ticket.world_size for r in (first, second))
    names = sorted(key for key in {*ours, *theirs} if key != _JOB and _is_common(key, ranks))
    for key in names:
        left, right = ours.get(key), theirs.get(key)
        if left is None or right is None:
            place = "second" if left is None else "first"
            found.append(Difference(str(key), f"only in the {place}"))
            continue
        if (left.dtype, left.shape) != (right.dtype, right.shape) and key.kind != KIND_BLOB:
            found.append(Difference(str(key), f"{left.dtype}{list(left.shape)} in the first, "
                                    f"{right.dtype}{list(right.shape)} in the second"))  # fmt: skip
            continue
        how = (_blobs(first, second, key) if key.kind == KIND_BLOB
               else _tensors(first, second, key, left))  # fmt: skip
        found += [] if how is None else [Difference(str(key), how)]
        count, size_bytes = count + 1, size_bytes + math.prod(left.shape) * ITEM_BYTES[left.dtype]
    return Comparison(count, size_bytes, (*found, *_jobs(first, second)))


def _is_common(key: TensorKey, ranks: int) -> bool:
    rank = key.scope.removeprefix("rank-")
    return rank == key.scope or not rank.isdigit() or int(rank) < ranks


def _tensors(
    first: CheckpointReader, second: CheckpointReader, key: TensorKey, stored: StoredTensor
) -> str | None:
    """Where two tensors of one shape differ first, and in how many elements."""
    width, total = ITEM_BYTES[stored.dtype], math.prod(stored.shape)
    step, place, count = max(1, RUN_BYTES // width), -1, 0
    for start in range(0, total, step):
        interval = Interval(start, min(start + step, total))
        left, right = (_read(reader, key, stored, interval) for reader in (first, second))
        if np.array_equal(left, right):
            continue
        differing = np.flatnonzero((left != right).reshape(-1, width).any(axis=1))
        place = start + int(differing[0]) if place < 0 else place
        count += len(differing)
    if not count:
        return None
    # An item of one element comes in its tensor's shape, which may be ().
    values = [reader.read_tensor(key, place, place + 1).reshape(-1)[0]
              for reader in (first, second)]  # fmt: skip
    return (f"{count} of {total} elements differ; the first is {place}: {values[0]!r} and "
            f"{values[1]!r}")  # fmt: skip


def _read(
    reader: CheckpointReader, key: TensorKey, stored: StoredTensor, interval: Interval
) -> np.ndarray[Any, Any]:
    fragment = Fragment(key, stored.dtype, stored.shape, interval)
    data = bytearray(fragment.size_bytes)
    reader.read_into([(fragment, data)])
    return np.frombuffer(data, np.uint8)


def _blobs(first: CheckpointReader, second: CheckpointReader, key: TensorKey) -> str | None:
    """Plain data of a rank: equal values have equal bytes; how many ranks there were may differ."""
    left, right = (_plain(reader, key) for reader in (first, second))
    names = [name for name in sorted({*left, *right} - {"world_size"})
             if _bytes(left.get(name)) != _bytes(right.get(name))]  # fmt: skip
    return f"differs in {', '.join(names)}" if names else None


def _jobs(first: CheckpointReader, second: CheckpointReader) -> Iterator[Difference]:
    left, right = (_plain(reader, _JOB) for reader in (first, second))
    for name in _JOB_PARTS:
        if _bytes(left.get(name)) != _bytes(right.get(name)):
            yield Difference(f"job: {name}", f"{left.get(name)!r:.300} in the first, "
                             f"{right.get(name)!r:.300} in the second")  # fmt: skip


def _plain(reader: CheckpointReader, key: TensorKey) -> dict[str, Any]:
    source = f"{reader.manifest.ticket.directory}: {key}"
    found = plain.decode(reader.blob(key), source=source)
    if not isinstance(found, dict):
        raise FormatError(f"{source}: holds a {type(found).__name__}, expected a dict")
    return found


def _bytes(value: Any) -> bytes:
    return plain.encode(value, what="a value that was stored")
