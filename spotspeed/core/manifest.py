"""Tickets, receipts and the sealed manifest: what makes a set of shards one checkpoint.

The digests form a tree: the seal covers the manifest's body, the body lists every receipt by
SHA-256, a receipt lists its shard's index by SHA-256, and the index lists every chunk by XXH3-128.
One hash thus vouches for every byte (docs/FORMAT.md, "Digest tree").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from spotspeed.core.documents import (
    FORMAT_MAJOR,
    FORMAT_MINOR,
    FORMAT_NAME,
    MAX_FILE_BYTES,
    MAX_WORLD_SIZE,
    MINOR_OF,
    OBJECTS_MAJOR,
    build,
    canonical_json,
    check_file,
    check_int,
    check_keys,
    check_name,
    check_sha256,
    field_of,
    seal,
    unseal,
)
from spotspeed.core.frozen import ObjectRecord, check_coverage
from spotspeed.errors import FormatError

__all__ = [
    "FORMAT_MAJOR", "FORMAT_MINOR", "FORMAT_NAME", "MANIFEST_FILE", "MAX_WORLD_SIZE", "Manifest",
    "Receipt", "ReceiptRecord", "ShardRecord", "Ticket", "canonical_json", "check_name",
    "decode_manifest", "decode_receipt", "encode_manifest", "encode_receipt", "seal_manifest",
]  # fmt: skip

MAX_STEP = 2**53
MAX_DOCUMENT_BYTES = 32 * 1024 * 1024
"""Most bytes of a manifest that are read: twice what MAX_WORLD_SIZE ranks need."""
MAX_RECEIPT_BYTES = 64 * 1024
MAX_ATTEMPT_CHARS = 64
MANIFEST_FILE = "manifest.json"
RECEIPT_SUFFIX = ".receipt"
REASONS = ("periodic", "notice", "explicit", "final")


@dataclass(frozen=True, slots=True)
class Ticket:
    """One save that all ranks agreed on, fixed before the first byte is staged.

    `epoch` counts the launches of this job at this path; `step` the optimizer updates completed;
    `attempt` tells several saves at one step apart. `created_unix_s` is each rank's own clock and
    no part of the ticket's identity; the manifest takes rank 0's.
    """

    epoch: int
    step: int
    attempt: str
    tag: str
    reason: str
    world_size: int
    created_unix_s: int = field(compare=False)
    restored_from: str | None = None

    def __post_init__(self) -> None:
        check_int("epoch", self.epoch, 1, MAX_STEP)
        check_int("step", self.step, 0, MAX_STEP)
        check_int("world_size", self.world_size, 1, MAX_WORLD_SIZE)
        check_int("created_unix_s", self.created_unix_s, 0, MAX_STEP)
        check_name("attempt", self.attempt)
        if len(self.attempt) > MAX_ATTEMPT_CHARS:
            raise FormatError(f"attempt {self.attempt!r}: at most {MAX_ATTEMPT_CHARS} characters")
        check_name("tag", self.tag)
        if self.reason not in REASONS:
            raise FormatError(f"reason {self.reason!r} is none of {', '.join(REASONS)}")
        if self.restored_from is not None:
            check_name("restored_from", self.restored_from)

    @property
    def directory(self) -> str:
        """Name of the checkpoint's directory; sorts by step, then by epoch."""
        return f"step-{self.step:012d}.e{self.epoch:06d}.{self.attempt}"

    def shard_path(self, rank: int) -> str:
        return f"{self.directory}/rank-{rank:05d}.shard"

    def receipt_path(self, rank: int) -> str:
        return f"{self.directory}/rank-{rank:05d}{RECEIPT_SUFFIX}"

    @property
    def manifest_path(self) -> str:
        return f"{self.directory}/{MANIFEST_FILE}"

    @property
    def digest(self) -> bytes:
        """SHA-256 of the identity; shards carry it, so that they cannot be mixed up."""
        identity = {key: value for key, value in asdict(self).items() if key != "created_unix_s"}
        return hashlib.sha256(canonical_json(identity)).digest()


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """Where one shard's index lies and what it must hash to; the index vouches for the data."""

    path: str
    size_bytes: int
    index_offset: int
    index_bytes: int
    index_sha256: str
    raw_bytes: int

    def __post_init__(self) -> None:
        check_file(self, least=0)


@dataclass(frozen=True, slots=True)
class Receipt:
    """One rank's statement that its shard, and every object that it refers to, is durable.

    `coverage` is the number of all of them together (core/coverage.py); version 1.0 had none.
    """

    ticket: Ticket
    rank: int
    shard: ShardRecord
    coverage: str | None = None
    objects: tuple[ObjectRecord, ...] = ()

    def __post_init__(self) -> None:
        if self.coverage is not None:
            check_coverage(self.coverage)
        if self.objects and self.coverage is None:
            raise FormatError(f"{self.shard.path}: refers to objects and has no coverage")

    @property
    def version(self) -> tuple[int, int]:
        """The oldest version of the format that says all of it."""
        if self.objects:
            return OBJECTS_MAJOR, MINOR_OF[OBJECTS_MAJOR]
        return FORMAT_MAJOR, 0 if self.coverage is None else FORMAT_MINOR


@dataclass(frozen=True, slots=True)
class ReceiptRecord:
    """How the manifest refers to one receipt."""

    rank: int
    path: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_int("size_bytes", self.size_bytes, 1, MAX_RECEIPT_BYTES)
        check_sha256("sha256", self.sha256)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A sealed checkpoint: the ticket and the digest of every receipt, in order of rank."""

    ticket: Ticket
    receipts: tuple[ReceiptRecord, ...]
    data_bytes: int
    minor: int = FORMAT_MINOR
    object_bytes: int = 0
    """Sizes of the frozen objects that the receipts refer to, together."""
    sealed_sha256: str | None = field(default=None, compare=False, repr=False)
    """The seal that was read: a newer minor version may have sealed more than is known here."""

    @property
    def major(self) -> int:
        """Major version of the document: what refers to objects has another one."""
        return OBJECTS_MAJOR if self.object_bytes else FORMAT_MAJOR

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the sealed body; identifies the checkpoint and every byte of it."""
        return self.sealed_sha256 or hashlib.sha256(_manifest_body(self)).hexdigest()


def encode_receipt(receipt: Receipt) -> bytes:
    """The stored form of a receipt, sealed with its own digest."""
    major, minor = receipt.version
    body = {"format": FORMAT_NAME, "major": major, "minor": minor, "document": "receipt",
            **asdict(receipt)}  # fmt: skip
    if receipt.coverage is None:
        del body["coverage"]
    if not receipt.objects:
        del body["objects"]
    return seal(body)


def decode_receipt(data: bytes, *, source: str) -> Receipt:
    """Parse a stored receipt; raises FormatError naming `source` when anything is off."""
    body, _ = unseal(data, source, "receipt", limit_bytes=MAX_RECEIPT_BYTES)
    has_objects = body["major"] == OBJECTS_MAJOR
    has_coverage = has_objects or body["minor"] > 0
    own = {"ticket", "rank", "shard"}
    own |= {"coverage"} if has_coverage else set()
    own |= {"objects"} if has_objects else set()
    check_keys(body, own, source)
    ticket = _ticket(body.get("ticket"), source)
    rank = field_of(body, "rank", int, source)
    if not 0 <= rank < ticket.world_size:
        raise FormatError(f"{source}: rank {rank} of {ticket.world_size}")
    shard = build(ShardRecord, body.get("shard"), source)
    if shard.path != ticket.shard_path(rank):
        raise FormatError(f"{source}: shard path {shard.path!r}, expected "
                          f"{ticket.shard_path(rank)!r}")  # fmt: skip
    coverage = field_of(body, "coverage", str, source) if has_coverage else None
    listed = field_of(body, "objects", list, source) if has_objects else []
    objects = tuple(build(ObjectRecord, item, source) for item in listed)
    if has_objects and len({item.path for item in objects}) != max(1, len(objects)):
        raise FormatError(f"{source}: lists no object, or one of them twice")
    try:
        return Receipt(ticket, rank, shard, coverage, objects)
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error


def seal_manifest(ticket: Ticket, receipts: Mapping[int, bytes]) -> tuple[Manifest, bytes]:
    """The manifest over all `receipts` (rank -> stored bytes), and its stored form.

    A pure function of its arguments: whoever seals, the bytes are the same, so sealing twice is
    harmless. Raises FormatError when a receipt is missing or belongs to another ticket.
    """
    missing = [rank for rank in range(ticket.world_size) if rank not in receipts]
    if missing:
        raise FormatError(f"{ticket.directory}: no receipt of ranks {missing[:8]}")
    records, data_bytes, object_bytes, issued = [], 0, 0, ticket
    minor = 0
    for rank in range(ticket.world_size):
        data, path = receipts[rank], ticket.receipt_path(rank)
        receipt = decode_receipt(data, source=path)
        if receipt.ticket != ticket or receipt.rank != rank:
            raise FormatError(f"{path}: belongs to {receipt.ticket.directory}, rank {receipt.rank}")
        records.append(ReceiptRecord(rank, path, len(data), hashlib.sha256(data).hexdigest()))
        data_bytes += receipt.shard.size_bytes
        object_bytes += sum(item.size_bytes for item in receipt.objects)
        minor = minor if receipt.coverage is None else FORMAT_MINOR
        issued = receipt.ticket if rank == 0 else issued
    if object_bytes:
        minor = MINOR_OF[OBJECTS_MAJOR]
    manifest = Manifest(issued, tuple(records), data_bytes, minor, object_bytes)
    return manifest, encode_manifest(manifest)


def encode_manifest(manifest: Manifest) -> bytes:
    """The stored form of a manifest: one JSON document with its seal."""
    return seal(json.loads(_manifest_body(manifest)))


def decode_manifest(data: bytes, *, source: str) -> Manifest:
    """Parse and verify a stored manifest; raises FormatError or ChecksumMismatchError."""
    body, sealed = unseal(data, source, "manifest", limit_bytes=MAX_DOCUMENT_BYTES)
    own = {"ticket", "receipts", "data_bytes"}
    has_objects = body["major"] == OBJECTS_MAJOR
    check_keys(body, own | ({"object_bytes"} if has_objects else set()), source)
    ticket = _ticket(body.get("ticket"), source)
    raw = body.get("receipts")
    if not isinstance(raw, list) or len(raw) != ticket.world_size:
        raise FormatError(f"{source}: {ticket.world_size} receipts expected")
    records = tuple(build(ReceiptRecord, item, source) for item in raw)
    for rank, record in enumerate(records):
        if (record.rank, record.path) != (rank, ticket.receipt_path(rank)):
            raise FormatError(f"{source}: receipt {rank} is {record.path!r} of rank {record.rank}")
    data_bytes = field_of(body, "data_bytes", int, source)
    if not 0 <= data_bytes <= MAX_FILE_BYTES:
        raise FormatError(f"{source}: data_bytes is {data_bytes}")
    object_bytes = field_of(body, "object_bytes", int, source) if has_objects else 0
    if has_objects and not 0 < object_bytes <= MAX_FILE_BYTES:
        raise FormatError(f"{source}: object_bytes is {object_bytes}")
    return Manifest(ticket, records, data_bytes, body["minor"], object_bytes, sealed)


def _manifest_body(manifest: Manifest) -> bytes:
    more = {"object_bytes": manifest.object_bytes} if manifest.object_bytes else {}
    return canonical_json({
        "format": FORMAT_NAME, "major": manifest.major, "minor": manifest.minor,
        "document": "manifest", "ticket": asdict(manifest.ticket),
        "receipts": [asdict(record) for record in manifest.receipts],
        "data_bytes": manifest.data_bytes, **more,
    })  # fmt: skip


def _ticket(raw: object, source: str) -> Ticket:
    ticket: Ticket = build(Ticket, raw, source)
    return ticket
