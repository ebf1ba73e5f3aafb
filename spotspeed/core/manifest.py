"""Tickets, receipts and the sealed manifest: what makes a set of shards one checkpoint.

The digests form a tree: the seal covers the manifest's body, the body lists every receipt by
SHA-256, a receipt lists its shard's index by SHA-256, and the index lists every chunk by XXH3-128.
One hash thus vouches for every byte (docs/FORMAT.md, "Digest tree").
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from spotspeed.errors import ChecksumMismatchError, FormatError

FORMAT_NAME = "spotspeed"
FORMAT_MAJOR = 1
FORMAT_MINOR = 0
MAX_WORLD_SIZE = 65_536
MAX_STEP = 2**53
MAX_DOCUMENT_BYTES = 32 * 1024 * 1024
"""Most bytes of a manifest that are read: twice what MAX_WORLD_SIZE ranks need."""
MAX_RECEIPT_BYTES = 64 * 1024
MAX_ATTEMPT_CHARS = 64
MANIFEST_FILE = "manifest.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,199}")
_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_DEPTH = 4
_MAX_CONTAINERS = MAX_WORLD_SIZE + 64
_MAX_DIGITS = 20
_MAX_FILE_BYTES = 2**62
REASONS = ("periodic", "notice", "explicit", "final")


def check_name(what: str, name: object) -> str:
    """`name` if it is safe as one path component; raises FormatError with the rule if not."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise FormatError(
            f"{what} {name!r} is not usable as a name: at most 200 letters, digits or . _ + = -, "
            f"beginning with a letter or digit, without '..'"
        )
    return name


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
        _check_int("epoch", self.epoch, 1, MAX_STEP)
        _check_int("step", self.step, 0, MAX_STEP)
        _check_int("world_size", self.world_size, 1, MAX_WORLD_SIZE)
        _check_int("created_unix_s", self.created_unix_s, 0, MAX_STEP)
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
        return f"{self.directory}/rank-{rank:05d}.receipt"

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
        for name in ("size_bytes", "index_offset", "index_bytes", "raw_bytes"):
            _check_int(name, getattr(self, name), 0, _MAX_FILE_BYTES)
        _check_sha256("index_sha256", self.index_sha256)
        if self.index_offset + self.index_bytes > self.size_bytes:
            raise FormatError(f"{self.path}: the index lies outside the shard")


@dataclass(frozen=True, slots=True)
class Receipt:
    """One rank's statement that its shard is durable."""

    ticket: Ticket
    rank: int
    shard: ShardRecord


@dataclass(frozen=True, slots=True)
class ReceiptRecord:
    """How the manifest refers to one receipt."""

    rank: int
    path: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        _check_int("size_bytes", self.size_bytes, 1, MAX_RECEIPT_BYTES)
        _check_sha256("sha256", self.sha256)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A sealed checkpoint: the ticket and the digest of every receipt, in order of rank."""

    ticket: Ticket
    receipts: tuple[ReceiptRecord, ...]
    data_bytes: int
    minor: int = FORMAT_MINOR
    sealed_sha256: str | None = field(default=None, compare=False, repr=False)
    """The seal that was read: a newer minor version may have sealed more than is known here."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the sealed body; identifies the checkpoint and every byte of it."""
        return self.sealed_sha256 or hashlib.sha256(_manifest_body(self)).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one JSON form of plain data that is hashed: sorted keys, no spaces, ASCII."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def encode_receipt(receipt: Receipt) -> bytes:
    """The stored form of a receipt, sealed with its own digest."""
    return _seal({"format": FORMAT_NAME, "major": FORMAT_MAJOR, "minor": FORMAT_MINOR,
                  "document": "receipt", **asdict(receipt)})  # fmt: skip


def decode_receipt(data: bytes, *, source: str) -> Receipt:
    """Parse a stored receipt; raises FormatError naming `source` when anything is off."""
    body, _ = _unseal(data, source, "receipt", limit_bytes=MAX_RECEIPT_BYTES)
    _check_keys(body, {"ticket", "rank", "shard"}, source)
    ticket = _ticket(body.get("ticket"), source)
    rank = _field(body, "rank", int, source)
    if not 0 <= rank < ticket.world_size:
        raise FormatError(f"{source}: rank {rank} of {ticket.world_size}")
    shard = _build(ShardRecord, body.get("shard"), source)
    if shard.path != ticket.shard_path(rank):
        raise FormatError(f"{source}: shard path {shard.path!r}, expected "
                          f"{ticket.shard_path(rank)!r}")  # fmt: skip
    return Receipt(ticket, rank, shard)


def seal_manifest(ticket: Ticket, receipts: Mapping[int, bytes]) -> tuple[Manifest, bytes]:
    """The manifest over all `receipts` (rank -> stored bytes), and its stored form.

    A pure function of its arguments: whoever seals, the bytes are the same, so sealing twice is
    harmless. Raises FormatError when a receipt is missing or belongs to another ticket.
    """
    missing = [rank for rank in range(ticket.world_size) if rank not in receipts]
    if missing:
        raise FormatError(f"{ticket.directory}: no receipt of ranks {missing[:8]}")
    records, data_bytes, issued = [], 0, ticket
    for rank in range(ticket.world_size):
        data, path = receipts[rank], ticket.receipt_path(rank)
        receipt = decode_receipt(data, source=path)
        if receipt.ticket != ticket or receipt.rank != rank:
            raise FormatError(f"{path}: belongs to {receipt.ticket.directory}, rank {receipt.rank}")
        records.append(ReceiptRecord(rank, path, len(data), hashlib.sha256(data).hexdigest()))
        data_bytes += receipt.shard.size_bytes
        issued = receipt.ticket if rank == 0 else issued
    manifest = Manifest(issued, tuple(records), data_bytes)
    return manifest, encode_manifest(manifest)


def encode_manifest(manifest: Manifest) -> bytes:
    """The stored form of a manifest: one JSON document with its seal."""
    return _seal(json.loads(_manifest_body(manifest)))


def decode_manifest(data: bytes, *, source: str) -> Manifest:
    """Parse and verify a stored manifest; raises FormatError or ChecksumMismatchError."""
    body, sealed = _unseal(data, source, "manifest", limit_bytes=MAX_DOCUMENT_BYTES)
    _check_keys(body, {"ticket", "receipts", "data_bytes"}, source)
    ticket = _ticket(body.get("ticket"), source)
    raw = body.get("receipts")
    if not isinstance(raw, list) or len(raw) != ticket.world_size:
        raise FormatError(f"{source}: {ticket.world_size} receipts expected")
    records = tuple(_build(ReceiptRecord, item, source) for item in raw)
    for rank, record in enumerate(records):
        if (record.rank, record.path) != (rank, ticket.receipt_path(rank)):
            raise FormatError(f"{source}: receipt {rank} is {record.path!r} of rank {record.rank}")
    data_bytes = _field(body, "data_bytes", int, source)
    if not 0 <= data_bytes <= _MAX_FILE_BYTES:
        raise FormatError(f"{source}: data_bytes is {data_bytes}")
    return Manifest(ticket, records, data_bytes, body["minor"], sealed)


def _manifest_body(manifest: Manifest) -> bytes:
    return canonical_json({
        "format": FORMAT_NAME, "major": FORMAT_MAJOR, "minor": manifest.minor,
        "document": "manifest", "ticket": asdict(manifest.ticket),
        "receipts": [asdict(record) for record in manifest.receipts],
        "data_bytes": manifest.data_bytes,
    })  # fmt: skip


_SEAL_START = b'{"body":'
_SEAL_MIDDLE = b',"sha256":"'
_SEAL_STOP = b'"}\n'


def _seal(body: dict[str, Any]) -> bytes:
    data = canonical_json(body)
    digest = hashlib.sha256(data).hexdigest().encode("ascii")
    return _SEAL_START + data + _SEAL_MIDDLE + digest + _SEAL_STOP


def _unseal(
    data: bytes, source: str, document: str, *, limit_bytes: int
) -> tuple[dict[str, Any], str]:
    """The body of a sealed document and its digest; the digest is checked before the parsing."""
    if len(data) > limit_bytes:
        raise FormatError(f"{source}: {len(data)} bytes, at most {limit_bytes} are read")
    stop = len(data) - len(_SEAL_STOP)
    middle = stop - 64 - len(_SEAL_MIDDLE)
    if not (
        middle > len(_SEAL_START)
        and data.startswith(_SEAL_START)
        and data[middle:].startswith(_SEAL_MIDDLE)
        and data.endswith(_SEAL_STOP)
        and _HEX_SHA256.fullmatch(expected := data[stop - 64 : stop].decode("latin-1"))
    ):
        raise FormatError(f"{source}: not a sealed {document}; cut short or damaged")
    content = data[len(_SEAL_START) : middle]
    actual = hashlib.sha256(content).hexdigest()
    if expected != actual:
        raise ChecksumMismatchError(key=source, expected=expected, actual=actual)
    body = _parse(content, source)
    if body.get("format") != FORMAT_NAME or body.get("document") != document:
        raise FormatError(f"{source}: not a {FORMAT_NAME} {document}")
    _check_version(body, source)
    return body, actual


def _parse(content: bytes, source: str) -> dict[str, Any]:
    """Canonical JSON of dicts, lists, text, None and integers; FormatError for anything else.

    How many values there can be is counted first, so that hostile input costs bounded memory.
    """
    if content.count(b"{") + content.count(b"[") > _MAX_CONTAINERS or (
        content.count(b",") > 8 * _MAX_CONTAINERS
    ):
        raise FormatError(f"{source}: holds more values than any document of this format")
    try:
        body = json.loads(
            content.decode("ascii"), parse_int=_integer, parse_float=_refuse, parse_constant=_refuse
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source}: does not parse: {type(error).__name__}") from error
    level = [body]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for value in level
            if isinstance(value, (dict, list))
            for item in (value.values() if isinstance(value, dict) else value)
        ]
    if any(isinstance(value, (dict, list)) for value in level):
        raise FormatError(f"{source}: nested more than {_MAX_DEPTH} levels deep")
    if not isinstance(body, dict) or canonical_json(body) != content:
        raise FormatError(f"{source}: not in canonical form")
    return body


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not an integer")


def _check_version(body: Mapping[str, Any], source: str) -> None:
    if _field(body, "major", int, source) != FORMAT_MAJOR:
        raise FormatError(
            f"{source}: format {body['major']}.{body.get('minor')!r:.80}, this version reads "
            f"{FORMAT_MAJOR}.x: install a spotspeed that knows it"
        )
    if not 0 <= _field(body, "minor", int, source) < 2**16:
        raise FormatError(f"{source}: minor version {body['minor']}")


def _check_keys(body: Mapping[str, Any], own: set[str], source: str) -> None:
    """Unknown keys are for newer minor versions only."""
    expected = own | {"format", "document", "major", "minor"}
    unknown = sorted(set(body) - expected)
    if unknown and body["minor"] <= FORMAT_MINOR:
        raise FormatError(f"{source}: unknown key {unknown[0]!r:.80}")


def _ticket(raw: object, source: str) -> Ticket:
    ticket: Ticket = _build(Ticket, raw, source)
    return ticket


def _field(body: Mapping[str, Any], key: str, kind: type, source: str) -> Any:
    value = body.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise FormatError(f"{source}: {key} is {value!r:.80}, expected {kind.__name__}")
    return value


def _build(cls: Any, raw: object, source: str) -> Any:
    """A frozen dataclass of str, int and None fields from plain data, types checked."""
    if not isinstance(raw, dict) or set(raw) != set(cls.__slots__):
        raise FormatError(f"{source}: {cls.__name__} needs exactly {sorted(cls.__slots__)}")
    for name, annotation in cls.__annotations__.items():
        allowed = {"int": int, "str": str, "str | None": (str, type(None))}[annotation]
        value = raw[name]
        if not isinstance(value, allowed) or isinstance(value, bool):  # type: ignore[arg-type]
            raise FormatError(f"{source}: {cls.__name__}.{name} is {value!r:.80}: not {annotation}")
    try:
        return cls(**raw)
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error


def _check_int(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise FormatError(f"{name} is {value!r}, expected {low} to {high}")


def _check_sha256(name: str, value: str) -> None:
    if not _HEX_SHA256.fullmatch(value):
        raise FormatError(f"{name} is {value!r:.80}, expected 64 hexadecimal digits")
