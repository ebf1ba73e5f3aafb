"""Opens the files of a sealed checkpoint top down, each checked against what lists it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from spotspeed.core.format import FOOTER_BYTES, Footer, encode_footer
from spotspeed.core.frozen import ObjectRecord
from spotspeed.core.index import MAX_INDEX_BYTES, ShardIndex, parse_index
from spotspeed.core.manifest import (
    MANIFEST_FILE,
    MAX_DOCUMENT_BYTES,
    MAX_RECEIPT_BYTES,
    Manifest,
    Receipt,
    ShardRecord,
    decode_manifest,
    decode_receipt,
)
from spotspeed.errors import (
    ChecksumMismatchError,
    CorruptionError,
    FormatError,
    ObjectNotFoundError,
    UnreadableError,
)
from spotspeed.storage.contract import Storage


@dataclass(frozen=True, slots=True)
class OpenShard:
    """A shard whose receipt and index have been verified; its frames have not been read."""

    receipt: Receipt
    index: ShardIndex
    object: ObjectRecord | None = None
    """Which frozen object of the receipt this is; None for the rank's own shard."""

    @property
    def record(self) -> ShardRecord | ObjectRecord:
        """Where the index lies and what it hashes to, as the receipt says."""
        return self.object or self.receipt.shard

    @property
    def path(self) -> str:
        return self.record.path


def place(storage: Storage, key: str) -> str:
    """Where object `key` is, for messages."""
    return f"{storage.url.rstrip('/')}/{key}"


@contextlib.contextmanager
def listed(storage: Storage, key: str) -> Iterator[None]:
    """Turns the absence of `key`, which a sealed checkpoint lists, into CorruptionError.

    So it does with a device that cannot read it; a store that does not answer is no damage.
    """
    try:
        yield
    except UnreadableError as error:
        raise CorruptionError(
            f"{place(storage, key)}: the sealed checkpoint lists this file, and it cannot be read: "
            f"{error}"
        ) from error
    except ObjectNotFoundError as error:
        raise CorruptionError(
            f"{place(storage, key)}: the sealed checkpoint lists this file, and it is gone"
        ) from error


def open_manifest(storage: Storage, directory: str, *, digest: str | None = None) -> Manifest:
    """The manifest of checkpoint `directory`, which must have `digest` if that is given.

    Raises ObjectNotFoundError when there is none: the directory is no sealed checkpoint;
    CorruptionError when it is damaged or cannot be read.
    """
    key = f"{directory}/{MANIFEST_FILE}"
    source = place(storage, key)
    try:
        data = storage.get(key, MAX_DOCUMENT_BYTES)
    except UnreadableError as error:
        raise CorruptionError(f"{source}: the manifest cannot be read: {error}") from error
    manifest = decode_manifest(data, source=source)
    if manifest.ticket.directory != directory:
        raise FormatError(f"{source}: belongs to {manifest.ticket.directory}")
    if digest is not None and manifest.digest != digest:
        raise ChecksumMismatchError(key=source, expected=digest, actual=manifest.digest)
    return manifest


def open_receipt(storage: Storage, manifest: Manifest, rank: int) -> Receipt:
    """Rank `rank`'s receipt, which must be the one that the manifest lists."""
    record = manifest.receipts[rank]
    source = place(storage, record.path)
    with listed(storage, record.path):
        data = storage.get(record.path, MAX_RECEIPT_BYTES)
    actual = hashlib.sha256(data).hexdigest()
    if len(data) != record.size_bytes or actual != record.sha256:
        raise ChecksumMismatchError(key=source, expected=record.sha256, actual=actual)
    receipt = decode_receipt(data, source=source)
    if receipt.ticket != manifest.ticket or receipt.rank != rank:
        raise FormatError(f"{source}: belongs to {receipt.ticket.directory}, rank {receipt.rank}")
    return receipt


def open_shard(storage: Storage, receipt: Receipt) -> OpenShard:
    """The shard that `receipt` describes: its size and the end of the file are checked."""
    tail, source = _tail(storage, receipt.shard)
    return OpenShard(receipt, check_tail(receipt, tail, source))


def open_object(storage: Storage, receipt: Receipt, record: ObjectRecord) -> OpenShard:
    """The frozen object that `receipt` refers to by `record`, checked like a shard."""
    tail, source = _tail(storage, record)
    index = _index(record, (bytes.fromhex(record.content), 0, 1), tail, source)
    return OpenShard(receipt, index, record)


def objects_of(
    storage: Storage, receipts: Iterable[Receipt]
) -> tuple[list[tuple[Receipt, ObjectRecord]], list[FormatError]]:
    """Every frozen object that `receipts` list, once, and an error for each that is listed again.

    Nothing has been opened yet: whoever lists one object ten thousand times has it read once.
    """
    first: dict[str, tuple[Receipt, ObjectRecord]] = {}
    again: list[FormatError] = []
    for receipt in receipts:
        for item in receipt.objects:
            holder, _ = first.setdefault(item.path, (receipt, item))
            if holder is not receipt:
                again.append(FormatError(
                    f"{place(storage, item.path)}: this frozen object is listed by rank "
                    f"{holder.rank} and by rank {receipt.rank}; one rank alone may list it"
                ))  # fmt: skip
    return list(first.values()), again


def check_tail(receipt: Receipt, tail: bytes, source: str) -> ShardIndex:
    """The index in `tail`, the bytes from the index to the end of the file."""
    ticket = receipt.ticket
    identity = (ticket.digest, receipt.rank, ticket.world_size)
    return _index(receipt.shard, identity, tail, source)


def _tail(storage: Storage, record: ShardRecord | ObjectRecord) -> tuple[bytes, str]:
    """The bytes from the index to the end of the file, whose size is checked, and its place."""
    source = place(storage, record.path)
    if record.index_bytes > MAX_INDEX_BYTES:
        raise FormatError(f"{source}: an index of {record.index_bytes} bytes, the limit is "
                          f"{MAX_INDEX_BYTES}")  # fmt: skip
    tail = bytearray(record.index_bytes + FOOTER_BYTES)
    with listed(storage, record.path):
        size_bytes = storage.size(record.path)
        if size_bytes != record.size_bytes:
            raise FormatError(
                f"{source}: has {size_bytes} bytes, {record.size_bytes} were written; it was cut "
                f"short or appended to"
            )
        storage.read_into(record.path, record.index_offset, tail)
    return bytes(tail), source


def _index(
    record: ShardRecord | ObjectRecord, identity: tuple[bytes, int, int], tail: bytes, source: str
) -> ShardIndex:
    """The index in `tail`, which must be what `record` says and of `identity`.

    That is (ticket digest or content, rank, world size).
    """
    data, footer = tail[: record.index_bytes], tail[record.index_bytes :]
    actual = hashlib.sha256(data)
    if actual.hexdigest() != record.index_sha256:
        raise ChecksumMismatchError(
            key=f"{source}#index", expected=record.index_sha256, actual=actual.hexdigest()
        )
    index = parse_index(data, source=source)
    right = Footer(record.index_offset, record.index_bytes, actual.digest(), index.minor)
    if footer != encode_footer(right) or right.file_bytes != record.size_bytes:
        raise FormatError(f"{source}: the footer is not the one that was written")
    found = (index.ticket_digest, index.rank, index.world_size, index.raw_bytes, index.frames_stop)
    if found != (*identity, record.raw_bytes, record.index_offset):
        raise FormatError(f"{source}: the index is of another shard than the receipt")
    return index
