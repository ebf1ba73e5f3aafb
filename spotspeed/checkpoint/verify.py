"""Reads every byte of a sealed checkpoint and says what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from spotspeed.checkpoint.fetch import SPAN_BYTES, check_padding, unpack
from spotspeed.checkpoint.parallel import in_parallel
from spotspeed.checkpoint.sealed import (
    OpenShard,
    listed,
    open_manifest,
    open_object,
    open_receipt,
    open_shard,
    place,
)
from spotspeed.codec import check_digest
from spotspeed.core.format import (
    CODEC_RAW,
    HEADER_BYTES,
    Header,
    encode_header,
    parse_header,
)
from spotspeed.core.index import ChunkRecord
from spotspeed.core.manifest import Manifest
from spotspeed.core.reshard import gather, uncovered
from spotspeed.errors import CorruptionError, FormatError, InvalidLayoutError, ObjectNotFoundError
from spotspeed.storage.contract import Storage

_REPORTED_PER_FILE = 16


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was read, and every damage that was found (the first ones of each file)."""

    directory: str
    files: int
    bytes_read: int
    damages: tuple[CorruptionError, ...]

    @property
    def is_whole(self) -> bool:
        return not self.damages


@dataclass(frozen=True, slots=True)
class _RankPart:
    """What of one rank's part could be opened."""

    shards: tuple[OpenShard, ...]
    damages: tuple[CorruptionError, ...]
    files: int
    bytes_read: int

    @property
    def is_complete(self) -> bool:
        return not self.damages


@dataclass(frozen=True, slots=True)
class _ShardReport:
    bytes_read: int
    damages: tuple[CorruptionError, ...]


Seen = dict[tuple[str, str], tuple[CorruptionError, ...]]
"""Damage of frozen objects that have been read, by path and the digest of their index."""


def verify_checkpoint(
    storage: Storage, manifest: Manifest, *, threads: int = 4, seen: Seen | None = None
) -> VerifyReport:
    """Read manifest, receipts, shards and objects of a checkpoint whole; memory is bounded.

    Never raises for damage, which is what the report is for; other storage errors pass through.
    """
    directory = manifest.ticket.directory
    damages: list[CorruptionError] = []
    try:
        open_manifest(storage, directory, digest=manifest.digest)
    except ObjectNotFoundError:
        damages.append(CorruptionError(f"{place(storage, manifest.ticket.manifest_path)}: gone"))
    except CorruptionError as error:
        damages.append(error)
    ranks = range(manifest.ticket.world_size)
    parts = in_parallel(lambda rank: _open_rank(storage, manifest, rank), ranks, threads=threads)
    opened = [shard for part in parts for shard in part.shards]
    damages += [damage for part in parts for damage in part.damages]
    known = {} if seen is None else seen
    reports = in_parallel(
        lambda shard: _verify_once(storage, shard, known), opened, threads=threads
    )
    for report in reports:
        damages += report.damages
    if all(part.is_complete for part in parts):
        damages += _incomplete(place(storage, directory), opened)
    bytes_read = sum(part.bytes_read for part in parts) + sum(r.bytes_read for r in reports)
    files = 1 + sum(part.files for part in parts)
    return VerifyReport(directory, files, bytes_read, tuple(damages))


def _open_rank(storage: Storage, manifest: Manifest, rank: int) -> _RankPart:
    """A rank's receipt, its shard and the objects that it refers to, as far as they open."""
    try:
        receipt = open_receipt(storage, manifest, rank)
    except CorruptionError as error:
        return _RankPart((), (error,), 2, 0)
    shards: list[OpenShard] = []
    damages: list[CorruptionError] = []
    for item in (None, *receipt.objects):
        try:
            shards.append(open_shard(storage, receipt) if item is None
                          else open_object(storage, receipt, item))  # fmt: skip
        except CorruptionError as error:
            damages.append(error)
    files = 2 + len(receipt.objects)
    return _RankPart(tuple(shards), tuple(damages), files, manifest.receipts[rank].size_bytes)


def _verify_once(storage: Storage, shard: OpenShard, seen: Seen) -> _ShardReport:
    """As `_verify_shard`; an object that has been `seen` is not read again."""
    if shard.object is None:
        return _verify_shard(storage, shard)
    key = shard.object.path, shard.object.index_sha256
    if key in seen:
        return _ShardReport(0, seen[key])
    report = _verify_shard(storage, shard)
    seen[key] = report.damages
    return report


def _verify_shard(storage: Storage, shard: OpenShard) -> _ShardReport:
    damages: list[CorruptionError] = []
    try:
        for damage in _damages(storage, shard):
            damages.append(damage)
            if len(damages) == _REPORTED_PER_FILE:
                break
    except CorruptionError as error:
        damages.append(error)
    return _ShardReport(shard.record.size_bytes, tuple(damages))


def _damages(storage: Storage, shard: OpenShard) -> Iterator[CorruptionError]:
    """Every damage before the index, which has been verified by opening the shard."""
    source = place(storage, shard.path)
    buffer = memoryview(bytearray(SPAN_BYTES))
    position = 0
    for group in _groups(shard):
        stop = group[-1][1].file_stop if group else shard.index.frames_stop
        if stop - position > len(buffer):
            buffer = memoryview(bytearray(stop - position))
        view = buffer[: stop - position]
        with listed(storage, shard.path):
            storage.read_into(shard.path, position, view)
        reach = position
        if position == 0:
            yield from _header_damage(shard, view[:HEADER_BYTES], source)
            reach = HEADER_BYTES
        for number, record in group:
            gap = view[reach - position : record.file_offset - position]
            yield from _caught(check_padding, gap, f"{source}: before chunk {number}")
            frame = view[record.file_offset - position : record.file_stop - position]
            yield from _caught(_check_chunk, frame, record, f"{source}#chunk {number}")
            reach = record.file_stop
        if not group:
            gap = view[reach - position :]
            yield from _caught(check_padding, gap, f"{source}: before the index")
        position = stop


def _groups(shard: OpenShard) -> Iterator[list[tuple[int, ChunkRecord]]]:
    """Consecutive chunks of about SPAN_BYTES, and an empty group for what is behind the last."""
    group: list[tuple[int, ChunkRecord]] = []
    position = 0
    for number, record in enumerate(shard.index.chunks):
        if group and record.file_stop - position > SPAN_BYTES:
            position = group[-1][1].file_stop
            yield group
            group = []
        group.append((number, record))
    if group:
        yield group
    yield []


def _header_damage(shard: OpenShard, data: memoryview, source: str) -> Iterator[CorruptionError]:
    index = shard.index
    right = Header(index.ticket_digest, index.rank, index.world_size, index.minor)
    if data == encode_header(right):
        return
    try:
        parse_header(bytes(data), source=source)
    except CorruptionError as error:
        yield error
    else:
        yield FormatError(f"{source}: the header is of another shard")


def _check_chunk(frame: memoryview, record: ChunkRecord, key: str) -> None:
    check_digest(frame, record.stored_digest, key=key)
    if record.codec != CODEC_RAW:
        unpack(frame, record, memoryview(bytearray(record.raw_size)), key=key)


def _caught(check: Callable[..., None], *arguments: object) -> Iterator[CorruptionError]:
    try:
        check(*arguments)
    except CorruptionError as error:
        yield error


def _incomplete(source: str, shards: list[OpenShard]) -> Iterator[CorruptionError]:
    """Tensors that the shards together do not hold wholly and once."""
    try:
        tensors = gather([shard.index.entries for shard in shards])
    except InvalidLayoutError as error:
        yield FormatError(f"{source}: the shards contradict each other: {error}")
        return
    for key, tensor in tensors.items():
        gap = uncovered(tensor)
        if gap is not None:
            yield FormatError(f"{source}: no shard holds elements [{gap.start}, {gap.stop}) of "
                              f"{key}")  # fmt: skip
