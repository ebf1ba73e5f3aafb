"""Reads a sealed checkpoint: any fragment, into any layout, every byte verified."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spotspeed.checkpoint.arrays import to_numpy
from spotspeed.checkpoint.fetch import Span, fetch, plan_spans
from spotspeed.checkpoint.near import Near
from spotspeed.checkpoint.parallel import in_parallel
from spotspeed.checkpoint.regions import Regions, join
from spotspeed.checkpoint.sealed import (
    OpenShard,
    objects_of,
    open_manifest,
    open_object,
    open_receipt,
    open_shard,
    place,
)
from spotspeed.checkpoint.verify import Seen, VerifyReport, verify_checkpoint
from spotspeed.core.format import FOOTER_BYTES
from spotspeed.core.frozen import ObjectRecord
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, StoredTensor, TensorKey
from spotspeed.core.manifest import Manifest
from spotspeed.core.plain_codes import MAX_BYTES
from spotspeed.core.reshard import gather, plan_reads
from spotspeed.errors import FormatError, InvalidLayoutError
from spotspeed.storage.contract import Storage, WriteBuffer, as_bytes_view

THREADS = 4


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What one `read_into` did: bytes asked for, bytes of frames read for them, in how many reads.

    Receipts and indexes, read once per reader, are in `CheckpointReader.metadata_bytes`.
    """

    bytes_wanted: int
    bytes_read: int
    reads: int
    chunks: int


class CheckpointReader:
    """A sealed checkpoint, opened when first asked; may be used from several threads.

    Every damage is CorruptionError naming the file, a listed file that is gone too. Nothing read
    is trusted before its digest, up to the manifest's, has been checked.
    """

    def __init__(
        self, storage: Storage, manifest: Manifest, *, threads: int = THREADS,
        near: Storage | None = None,
    ) -> None:  # fmt: skip
        """`near` is the tier of this node, which is asked first and never trusted."""
        self._storage = storage
        self._near = None if near is None else Near(near, manifest.ticket.directory)
        self._manifest = manifest
        self._threads = threads
        self._lock = threading.Lock()
        self._shards: list[OpenShard] | None = None
        self._tensors: dict[TensorKey, StoredTensor] = {}

    @classmethod
    def open(
        cls, storage: Storage, directory: str, *, digest: str | None = None,
        threads: int = THREADS, near: Storage | None = None,
    ) -> CheckpointReader:  # fmt: skip
        """The checkpoint in `directory`, whose manifest must have `digest` if that is given.

        Raises ObjectNotFoundError when the directory holds no sealed checkpoint.
        """
        manifest = open_manifest(storage, directory, digest=digest)
        return cls(storage, manifest, threads=threads, near=near)

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def near(self) -> Near | None:
        """This node's copies, and how much of what was read came from them."""
        return self._near

    @property
    def metadata_bytes(self) -> int:
        """Bytes of receipts, indexes and footers, which are read once."""
        shards = self._open()
        receipts = sum(record.size_bytes for record in self._manifest.receipts)
        return receipts + sum(s.record.index_bytes + FOOTER_BYTES for s in shards)

    def objects(self) -> tuple[ObjectRecord, ...]:
        """The frozen objects that this checkpoint refers to."""
        return tuple(shard.object for shard in self._open() if shard.object is not None)

    def tensors(self) -> Mapping[TensorKey, StoredTensor]:
        """Every logical tensor of the checkpoint and where its parts lie."""
        self._open()
        return self._tensors

    def read_into(self, requests: Sequence[tuple[Fragment, WriteBuffer]]) -> ReadReport:
        """Fill each buffer (exactly the fragment's bytes, writable) with its fragment.

        The checkpoint's ranks and layout do not matter. Buffers are borrowed until this returns,
        and hold undefined bytes when it raises: CorruptionError when something read is damaged,
        InvalidLayoutError when the checkpoint does not hold what is asked, ValueError for a
        buffer of another size.
        """
        targets = [_target(fragment, buffer) for fragment, buffer in requests]
        regions = join(targets)
        wanted_bytes, spans = self.plan([fragment for fragment, _ in requests], regions)
        bytes_read = self.read_spans(spans, regions.views)
        chunks = sum(len(span.chunks) for span in spans)
        return ReadReport(wanted_bytes, bytes_read, len(spans), chunks)

    def plan(
        self, fragments: Sequence[Fragment], regions: Regions | None = None
    ) -> tuple[int, list[Span]]:
        """The bytes of `fragments`, and the reads of whole chunks that serve them.

        They go into `regions`, where the fragments' targets have been joined to such. Raises
        InvalidLayoutError when the checkpoint does not hold what is asked.
        """
        shards, spans = self._open(), list[Span]()
        plan = plan_reads(self._tensors, fragments)
        for shard, transfers in plan.by_shard().items():
            moved = transfers if regions is None else regions.move(transfers)
            spans += plan_spans(shards[shard], moved)
        return plan.size_bytes, spans

    def read_spans(self, spans: Sequence[Span], targets: Sequence[memoryview]) -> int:
        """Read, verify and deliver planned reads; returns the bytes read. Raises as `read_into`."""
        return sum(in_parallel(
            lambda span: fetch(self._storage, span, targets, self._near), spans,
            threads=self._threads,
        ))  # fmt: skip

    def read_tensor(
        self, key: TensorKey, start: int = 0, stop: int | None = None
    ) -> np.ndarray[Any, Any]:
        """Elements [start, stop) of one tensor, flattened; the whole one in its own shape.

        Types that numpy does not have come as float32, which holds each of their values exactly:
        bfloat16 and the float8 types. Raises InvalidLayoutError for an unknown tensor or range.
        """
        tensor = self.tensors().get(key)
        if tensor is None:
            raise InvalidLayoutError(f"{key} is not in checkpoint {self._manifest.ticket.tag}")
        total = math.prod(tensor.shape)
        last = total if stop is None else stop
        if not 0 <= start <= last <= total:
            raise InvalidLayoutError(f"{key} has elements [0, {total}), [{start}, {last}) asked")
        data = self._read(key, tensor, Interval(start, last))
        array = to_numpy(data, tensor.dtype)
        return array.reshape(tensor.shape) if (start, last) == (0, total) else array

    def read_bytes(self, key: TensorKey) -> bytearray:
        """All elements of one tensor as they are stored, in row-major order.

        Raises InvalidLayoutError for an unknown tensor.
        """
        tensor = self.tensors().get(key)
        if tensor is None:
            raise InvalidLayoutError(f"{key} is not in checkpoint {self._manifest.ticket.tag}")
        return self._read(key, tensor, Interval(0, math.prod(tensor.shape)))

    def blob(self, key: TensorKey) -> memoryview:
        """The bytes of a one-dimensional uint8 tensor, such as the "job" blob: plain data."""
        tensor = self.tensors().get(key)
        if tensor is None or tensor.dtype != "uint8" or len(tensor.shape) != 1:
            raise FormatError(f"{self._place()}: holds no bytes called {key}")
        if tensor.shape[0] > MAX_BYTES:
            raise FormatError(f"{self._place()}: {key} has {tensor.shape[0]} bytes, at most "
                              f"{MAX_BYTES} are read as plain data")  # fmt: skip
        return memoryview(self._read(key, tensor, Interval(0, tensor.shape[0])))

    def verify(self) -> VerifyReport:
        """Read every file whole; raises the first CorruptionError when anything is damaged."""
        report = self.find_damage()
        if report.damages:
            raise report.damages[0]
        return report

    def find_damage(self, seen: Seen | None = None) -> VerifyReport:
        """Read every file whole and report all damage; uses nothing that was read before.

        With `seen`, frozen objects that several checkpoints refer to are read once.
        """
        return verify_checkpoint(self._storage, self._manifest, threads=self._threads, seen=seen)

    def _read(self, key: TensorKey, tensor: StoredTensor, interval: Interval) -> bytearray:
        fragment = Fragment(key, tensor.dtype, tensor.shape, interval)
        # Memory is taken for what is there, not for what a shape says.
        plan_reads({key: tensor}, [fragment])
        data = bytearray(fragment.size_bytes)
        self.read_into([(fragment, data)])
        return data

    def _open(self) -> list[OpenShard]:
        with self._lock:
            if self._shards is None:
                ranks = range(self._manifest.ticket.world_size)
                shards = in_parallel(self._open_shard, ranks, threads=self._threads)
                listed, again = objects_of(self._storage, (shard.receipt for shard in shards))
                if again:
                    raise again[0]
                shards += in_parallel(
                    lambda one: open_object(self._storage, *one), listed, threads=self._threads
                )
                try:
                    self._tensors = gather([shard.index.entries for shard in shards])
                except InvalidLayoutError as error:
                    raise FormatError(f"{self._place()}: {error}") from error
                self._shards = shards
            return self._shards

    def _open_shard(self, rank: int) -> OpenShard:
        near = None if self._near is None else self._near.open_shard(self._manifest, rank)
        if near is not None:
            return near
        return open_shard(self._storage, open_receipt(self._storage, self._manifest, rank))

    def _place(self) -> str:
        return place(self._storage, self._manifest.ticket.directory)


def _target(fragment: Fragment, buffer: WriteBuffer) -> memoryview:
    view = as_bytes_view(buffer)
    if view.readonly or len(view) != fragment.size_bytes:
        raise ValueError(
            f"{fragment.key}: {fragment.size_bytes} writable bytes needed, given {len(view)}"
            + (" read-only ones" if view.readonly else "")
        )
    return view
