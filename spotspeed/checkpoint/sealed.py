"""Opens the files of a sealed checkpoint top down, each checked against what lists it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from spotspeed.core.format import FOOTER_BYTES, Footer, encode_footer
from spotspeed.core.index import MAX_INDEX_BYTES, ShardIndex, parse_index
from spotspeed.core.manifest import (
    MANIFEST_FILE,
    MAX_DOCUMENT_BYTES,
    MAX_RECEIPT_BYTES,
    Manifest,
    Receipt,
    decode_manifest,
    decode_receipt,
)
from spotspeed.errors import (
    ChecksumMismatchError,
    CorruptionError,
    FormatError,
    ObjectNotFoundError,
)
from spotspeed.storage.contract import Storage


@dataclass(frozen=True, slots=True)
class OpenShard:
    """A shard whose receipt and index have been verified; its frames have not been read."""

    receipt: Receipt
    index: ShardIndex

    @property
    def path(self) -> str:
        return self.receipt.shard.path


def place(storage: Storage, key: str) -> str:
    """Where object `key` is, for messages."""
    return f"{storage.url.rstrip('/')}/{key}"


@contextlib.contextmanager
def listed(storage: Storage, key: str) -> Iterator[None]:
    """Turns the absence of `key`, which a sealed checkpoint lists, into CorruptionError."""
    try:
        yield
    except ObjectNotFoundError as error:
        raise CorruptionError(
            f"{place(storage, key)}: the sealed checkpoint lists this file, and it is gone"
        ) from error


def open_manifest(storage: Storage, directory: str, *, digest: str | None = None) -> Manifest:
    """The manifest of checkpoint `directory`, which must have `digest` if that is given.

    Raises ObjectNotFoundError when there is none: the directory is no sealed checkpoint.
    """
    key = f"{directory}/{MANIFEST_FILE}"
    source = place(storage, key)
    manifest = decode_manifest(storage.get(key, MAX_DOCUMENT_BYTES), source=source)
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
    shard = receipt.shard
    source = place(storage, shard.path)
    if shard.index_bytes > MAX_INDEX_BYTES:
        raise FormatError(f"{source}: an index of {shard.index_bytes} bytes, the limit is "
                          f"{MAX_INDEX_BYTES}")  # fmt: skip
    tail = bytearray(shard.index_bytes + FOOTER_BYTES)
    with listed(storage, shard.path):
        size_bytes = storage.size(shard.path)
        if size_bytes != shard.size_bytes:
            raise FormatError(
                f"{source}: has {size_bytes} bytes, {shard.size_bytes} were written; it was cut "
                f"short or appended to"
            )
        storage.read_into(shard.path, shard.index_offset, tail)
    return OpenShard(receipt, check_tail(receipt, bytes(tail), source))


def check_tail(receipt: Receipt, tail: bytes, source: str) -> ShardIndex:
    """The index in `tail`, the bytes from the index to the end of the file."""
    shard = receipt.shard
    data, footer = tail[: shard.index_bytes], tail[shard.index_bytes :]
    actual = hashlib.sha256(data)
    if actual.hexdigest() != shard.index_sha256:
        raise ChecksumMismatchError(
            key=f"{source}#index", expected=shard.index_sha256, actual=actual.hexdigest()
        )
    index = parse_index(data, source=source)
    right = Footer(shard.index_offset, shard.index_bytes, actual.digest(), index.minor)
    if footer != encode_footer(right) or right.file_bytes != shard.size_bytes:
        raise FormatError(f"{source}: the footer is not the one that was written")
    found = (index.ticket_digest, index.rank, index.world_size, index.raw_bytes, index.frames_stop)
    ticket = receipt.ticket
    if found != (ticket.digest, receipt.rank, ticket.world_size, shard.raw_bytes,
                 shard.index_offset):  # fmt: skip
        raise FormatError(f"{source}: the index is of another shard than the receipt")
    return index
