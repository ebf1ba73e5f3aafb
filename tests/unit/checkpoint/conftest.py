"""A small sealed checkpoint of several ranks, and a store that counts and can be damaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spotspeed.checkpoint.commit import try_seal
from spotspeed.checkpoint.shard import ShardWriter
from spotspeed.codec import RAW, CodecPolicy
from spotspeed.core.chunks import StreamLayout, pack
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Manifest, Ticket, encode_manifest, seal_manifest
from spotspeed.storage.contract import Storage
from spotspeed.storage.intercept import InterceptedStorage
from spotspeed.storage.local import LocalStorage
from spotspeed.storage.trace import Traced, Tracer

Tensors = dict[TensorKey, tuple[str, np.ndarray[Any, Any]]]


@dataclass(frozen=True)
class Written:
    """A sealed checkpoint, the store it is in, and the tensors that it must hold."""

    storage: Storage
    root: Path
    ticket: Ticket
    manifest: Manifest
    tensors: Tensors = field(repr=False)

    def file(self, key: str) -> Path:
        return self.root / key

    def fragment(self, key: TensorKey, start: int = 0, stop: int | None = None) -> Fragment:
        dtype, array = self.tensors[key]
        last = array.size if stop is None else stop
        return Fragment(key, dtype, array.shape, Interval(start, last))

    def bytes_of(self, fragment: Fragment) -> bytes:
        flat = self.tensors[fragment.key][1].reshape(-1)
        return flat[fragment.interval.start : fragment.interval.stop].tobytes()


class CountingStorage(InterceptedStorage):
    """Counts reads of whatever store it stands before."""

    def __init__(self, inner: Storage) -> None:
        self.reads: list[tuple[str, int]] = []
        super().__init__(inner, Tracer(self._note))

    def _note(self, traced: Traced) -> None:
        if traced.call.operation in ("get", "read"):
            self.reads.append((traced.call.key, traced.received_bytes))

    @property
    def bytes_read(self) -> int:
        return sum(size for _, size in self.reads)


def make_ticket(world_size: int, **changes: Any) -> Ticket:
    values = {"epoch": 1, "step": 10, "attempt": "a", "tag": "global_step10", "reason": "periodic",
              "world_size": world_size, "created_unix_s": 1_700_000_000, **changes}  # fmt: skip
    return Ticket(**values)


def make_tensors(seed: int = 0, *, scale: int = 1) -> Tensors:
    """A model in miniature: odd sizes, scalars, two dtypes, three optimizer kinds, blobs."""
    rng = np.random.default_rng(seed)
    shapes = {"embed.weight": (61 * scale, 17), "layers.0.weight": (33, 40 * scale),
              "layers.0.bias": (33,), "layers.10.weight": (7 * scale, 11, 13),
              "norm.scale": (1,)}  # fmt: skip
    tensors: Tensors = {}
    for kind in ("fp32", "exp_avg", "exp_avg_sq"):
        for name, shape in shapes.items():
            values = (rng.standard_normal(shape) * 0.02).astype(np.float32)
            tensors[TensorKey(kind, name)] = ("float32", values)
    for name in shapes:
        tensors[TensorKey("step", name)] = ("float32", np.array(10, np.float32))
    bits = rng.standard_normal((19, 23)).astype(np.float32).view(np.uint32) >> 16
    tensors[TensorKey("weight", "frozen.weight")] = ("bfloat16", bits.astype(np.uint16))
    tensors[TensorKey("buffer", "positions", "rank-0")] = ("int64", np.arange(37, dtype=np.int64))
    tensors[TensorKey("weight", "empty")] = ("float32", np.zeros((0, 4), np.float32))
    blob = np.frombuffer(rng.bytes(1500), np.uint8).copy()
    tensors[TensorKey("blob", "job")] = ("uint8", blob)
    return tensors


def split(tensors: Tensors, world_size: int) -> list[list[Fragment]]:
    """ZeRO's way: per kind one flat buffer over all tensors, cut into equal partitions."""
    fragments: list[list[Fragment]] = [[] for _ in range(world_size)]
    for kind in dict.fromkeys(key.kind for key in tensors):
        members = [(key, *tensors[key]) for key in tensors if key.kind == kind]
        total = sum(array.size for _, _, array in members)
        for rank in range(world_size):
            part = Interval(0, total).split(world_size, rank)
            position = 0
            for key, dtype, array in members:
                common = part.intersect(Interval(position, position + array.size))
                if common is not None or (array.size == 0 and rank == 0):
                    inside = common.shift(-position) if common else Interval(0, 0)
                    fragments[rank].append(Fragment(key, dtype, array.shape, inside))
                position += array.size
    return fragments


def chunk_bytes_of(layout: StreamLayout, fragments: Sequence[bytes], index: int) -> bytes:
    """The raw bytes of one chunk, `fragments` being the bytes of the layout's entries."""
    buffer = bytearray(layout.chunks[index].size_bytes)
    for part in layout.segments(index):
        data = fragments[part.entry][part.source_offset : part.source_offset + part.size_bytes]
        buffer[part.chunk_offset : part.chunk_offset + part.size_bytes] = data
    return bytes(buffer)


def write_shard(
    storage: Storage, ticket: Ticket, rank: int, layout: StreamLayout, tensors: Tensors,
    policy: CodecPolicy = RAW,
) -> None:  # fmt: skip
    data = []
    for entry in layout.entries:
        flat = tensors[entry.fragment.key][1].reshape(-1)
        data.append(flat[entry.fragment.interval.start : entry.fragment.interval.stop].tobytes())
    with ShardWriter(storage, ticket, rank, layout, policy) as writer:
        for chunk in layout.chunks:
            writer.put_chunk(chunk.index, chunk_bytes_of(layout, data, chunk.index))
        writer.finish()


def write_checkpoint(
    root: Path, tensors: Tensors, world_size: int, *, policy: CodecPolicy = RAW,
    chunk_bytes: int = 4096, ticket: Ticket | None = None,
) -> Written:  # fmt: skip
    storage = LocalStorage(root)
    ticket = ticket or make_ticket(world_size)
    for rank, fragments in enumerate(split(tensors, world_size)):
        layout = pack(fragments, chunk_bytes=chunk_bytes)
        write_shard(storage, ticket, rank, layout, tensors, policy)
    receipts = {rank: storage.get(ticket.receipt_path(rank), 1 << 20) for rank in range(world_size)}
    manifest, data = seal_manifest(ticket, receipts)
    assert data == encode_manifest(manifest)
    storage.put(ticket.manifest_path, data)
    return Written(storage, root, ticket, manifest, tensors)


@pytest.fixture
def checkpoint_factory(tmp_path: Path) -> Callable[..., Written]:
    """Writes a checkpoint of `make_tensors()`: factory(world_size, policy=, chunk_bytes=, ...)."""
    count = 0

    def factory(world_size: int = 3, *, tensors: Tensors | None = None, **options: Any) -> Written:
        nonlocal count
        count += 1
        held = make_tensors() if tensors is None else tensors
        return write_checkpoint(tmp_path / f"store-{count}", held, world_size, **options)

    return factory


@pytest.fixture
def counting() -> type[CountingStorage]:
    return CountingStorage


@pytest.fixture
def zero_split() -> Callable[[Tensors, int], list[list[Fragment]]]:
    return split


@pytest.fixture
def model_tensors() -> Callable[..., Tensors]:
    return make_tensors


Saver = Callable[..., Ticket]


@pytest.fixture
def save_small() -> Saver:
    """Writes shards and receipts of a tiny save: save(storage, epoch, step, ranks=, ...)."""

    def save(
        storage: Storage, epoch: int, step: int, *, ranks: Sequence[int] | None = None,
        world_size: int = 2, **changes: Any,
    ) -> Ticket:  # fmt: skip
        changes.setdefault("tag", f"global_step{step}")
        ticket = make_ticket(world_size, epoch=epoch, step=step, **changes)
        key = TensorKey("fp32", "weight")
        tensors: Tensors = {key: ("float32", np.full(8 * world_size, step, np.float32))}
        parts = split(tensors, world_size)
        for rank in range(world_size) if ranks is None else ranks:
            write_shard(storage, ticket, rank, pack(parts[rank], chunk_bytes=4096), tensors)
        return ticket

    return save


@pytest.fixture
def seal_small(save_small: Saver) -> Saver:
    """Like `save_small`, and seals it."""

    def seal(storage: Storage, epoch: int, step: int, **changes: Any) -> Ticket:
        ticket = save_small(storage, epoch, step, **changes)
        assert try_seal(storage, ticket) is not None
        return ticket

    return seal
