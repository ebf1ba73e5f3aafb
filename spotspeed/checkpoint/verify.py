"""Reads every byte of a sealed checkpoint and says what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from spotspeed.checkpoint.fetch import SPAN_BYTES, check_padding, scratch, unpack
from spotspeed.checkpoint.parallel import in_parallel
from spotspeed.checkpoint.sealed import (
    OpenShard,
    listed,
    objects_of,
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
from spotspeed.core.manifest import Manifest, Receipt
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
class _Part:
    """One shard or object, or why it does not open."""

    receipt: Receipt | None
    shard: OpenShard | None
    damage: CorruptionError | None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes [start, stop) of a file before its index: whole chunks and the padding before them."""

    shard: OpenShard
    start: int
    stop: int
    chunks: tuple[tuple[int, ChunkRecord], ...]
    """With their numbers; the last piece has none."""


Seen = dict[tuple[str, str], tuple[CorruptionError, ...]]
"""Damage of frozen objects that have been read, by path and the digest of their index."""


def verify_checkpoint(
    storage: Storage, manifest: Manifest, *, threads: int = 4, seen: Seen | None = None
) -> VerifyReport:
    """Read manifest, receipts, shards and objects of a checkpoint whole; memory is bounded.

    Files are read in pieces of about SPAN_BYTES, `threads` of them at a time, whatever their
    number. Never raises for damage, which is what the report is for; other storage errors pass
    through. Frozen objects that have been `seen` are not read again.
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
    frozen, again = objects_of(storage, (part.receipt for part in parts if part.receipt))
    parts += in_parallel(
        lambda one: _opened(one[0], lambda: open_object(storage, *one)), frozen, threads=threads
    )
    opened = [part.shard for part in parts if part.shard is not None]
    damages += [*(part.damage for part in parts if part.damage is not None), *again]
    known = {} if seen is None else seen
    unread = {_identity(shard): shard for shard in opened if _identity(shard) not in known}
    found = _read_all(storage, list(unread.values()), threads)
    known |= {key: found[key] for key, shard in unread.items() if shard.object is not None}
    for key in dict.fromkeys(_identity(shard) for shard in opened):
        damages += found.get(key) or known.get(key, ())
    if len(opened) == len(parts) and not again:
        damages += _incomplete(place(storage, directory), opened)
    bytes_read = sum(record.size_bytes for record in manifest.receipts)
    bytes_read += sum(shard.record.size_bytes for shard in unread.values())
    files = 1 + len(manifest.receipts) + len(parts)
    return VerifyReport(directory, files, bytes_read, tuple(damages))


def _identity(shard: OpenShard) -> tuple[str, str]:
    return shard.path, shard.record.index_sha256


def _open_rank(storage: Storage, manifest: Manifest, rank: int) -> _Part:
    """A rank's receipt and its shard, as far as they open."""
    try:
        receipt = open_receipt(storage, manifest, rank)
    except CorruptionError as error:
        return _Part(None, None, error)
    return _opened(receipt, lambda: open_shard(storage, receipt))


def _opened(receipt: Receipt, shard: Callable[[], OpenShard]) -> _Part:
    try:
        return _Part(receipt, shard(), None)
    except CorruptionError as error:
        return _Part(receipt, None, error)


def _read_all(storage: Storage, shards: list[OpenShard], threads: int) -> Seen:
    """The damage of each file, by its identity, the first ones in its order."""
    pieces = [piece for shard in shards for piece in _pieces(shard)]
    damages = in_parallel(
        lambda piece: _damages(storage, piece), pieces, threads=threads
    )  # fmt: skip
    found: dict[tuple[str, str], list[CorruptionError]] = {_identity(one): [] for one in shards}
    for piece, damage in zip(pieces, damages, strict=True):
        found[_identity(piece.shard)] += damage
    return {key: tuple(damage[:_REPORTED_PER_FILE]) for key, damage in found.items()}


def _pieces(shard: OpenShard) -> Iterator[_Piece]:
    """The file up to its index, which has been verified by opening it."""
    start, chunks = 0, list[tuple[int, ChunkRecord]]()
    for number, record in enumerate(shard.index.chunks):
        if chunks and record.file_stop - start > SPAN_BYTES:
            stop = chunks[-1][1].file_stop
            yield _Piece(shard, start, stop, tuple(chunks))
            start, chunks = stop, []
        chunks.append((number, record))
    if chunks:
        yield _Piece(shard, start, chunks[-1][1].file_stop, tuple(chunks))
        start = chunks[-1][1].file_stop
    yield _Piece(shard, start, shard.index.frames_stop, ())


def _damages(storage: Storage, piece: _Piece) -> list[CorruptionError]:
    """Every damage of a piece; where it cannot be read at all, that one."""
    shard, source = piece.shard, place(storage, piece.shard.path)
    view = scratch(piece.stop - piece.start)
    try:
        with listed(storage, shard.path):
            storage.read_into(shard.path, piece.start, view)
    except CorruptionError as error:
        return [error]
    found: list[CorruptionError] = []
    reach = piece.start
    if piece.start == 0:
        found += _header_damage(shard, view[:HEADER_BYTES], source)
        reach = HEADER_BYTES
    for number, record in piece.chunks:
        gap = view[reach - piece.start : record.file_offset - piece.start]
        found += _caught(check_padding, gap, f"{source}: before chunk {number}")
        frame = view[record.file_offset - piece.start : record.file_stop - piece.start]
        found += _caught(_check_chunk, frame, record, f"{source}#chunk {number}")
        reach = record.file_stop
    if not piece.chunks:
        gap = view[reach - piece.start :]
        found += _caught(check_padding, gap, f"{source}: before the index")
    return found


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
