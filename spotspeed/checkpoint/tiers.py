"""The tier of a node: the shards and receipts that its ranks wrote, on its own disk.

    LOCAL_PATH/run-<digest of the store's URL>/
        lock                                      held by the saver that uses it
        step-...e....attempt/rank-00003.shard     byte for byte what `path` gets
        step-...e....attempt/rank-00003.receipt   there: the shard is durable on this node
        step-...e....attempt/sealed.json          there: the checkpoint is sealed at `path`

There is no manifest here: the commit point is at `path` (docs/adr/0006-tiers.md).
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from spotspeed.checkpoint.catalog import scan
from spotspeed.checkpoint.fetch import SPAN_BYTES, check_padding
from spotspeed.checkpoint.ownership import read_epochs, read_restored
from spotspeed.checkpoint.sealed import OpenShard, check_tail, listed, open_shard, place
from spotspeed.codec import check_digest
from spotspeed.core.format import HEADER_BYTES, Header, encode_header
from spotspeed.core.index import ChunkRecord
from spotspeed.core.lineage import Place, place_of, trace_lineage
from spotspeed.core.manifest import (
    MAX_RECEIPT_BYTES,
    RECEIPT_SUFFIX,
    Receipt,
    Ticket,
    decode_receipt,
)
from spotspeed.core.retention import SILENCE_S
from spotspeed.core.tiers import node_directory
from spotspeed.errors import (
    ConfigError,
    CorruptionError,
    FormatError,
    ObjectNotFoundError,
    StorageError,
)
from spotspeed.staging.launch import rendezvous_url
from spotspeed.storage.contract import Storage
from spotspeed.storage.local import LocalStorage

SEALED_FILE = "sealed.json"


@dataclass(frozen=True, slots=True)
class NodePart:
    """One rank's part of a save that is durable in the tier of this node."""

    receipt: Receipt

    @property
    def ticket(self) -> Ticket:
        return self.receipt.ticket

    @property
    def rank(self) -> int:
        return self.receipt.rank

    @property
    def size_bytes(self) -> int:
        return self.receipt.shard.size_bytes


@dataclass(frozen=True, slots=True)
class NodeDirectory:
    """What the tier holds of one checkpoint; `causes` say what of it cannot be used."""

    directory: str
    parts: tuple[NodePart, ...]
    is_sealed: bool
    """Whether it is known here that the checkpoint is sealed at `path`."""
    causes: tuple[str, ...] = ()


def node_root(local_path: str, url: str) -> str:
    """The directory below `local_path` that belongs to the store `url`."""
    root = os.path.realpath(os.path.expanduser(local_path))
    return os.path.join(root, node_directory(rendezvous_url(url)))


def open_node(local_path: str, url: str) -> LocalStorage:
    """The tier of this node for the store `url`, as a store; nothing is created or checked."""
    return LocalStorage(node_root(local_path, url))


def check_local_path(local_path: str, url: str) -> None:
    """Raise ConfigError unless `local_path` is a writable directory apart from the store `url`."""
    root = os.path.realpath(os.path.expanduser(local_path))
    if "://" not in url:
        path = os.path.realpath(url)
        for inner, outer, relation in ((root, path, "is"), (root, path, "lies inside"),
                                       (path, root, "contains")):  # fmt: skip
            is_wrong = inner == outer if relation == "is" else inner.startswith(f"{outer}/")
            if is_wrong:
                raise ConfigError(
                    f"`local_path` {local_path!r} {relation} `path` {url!r}: give a directory on "
                    f"this node's own disk, apart from `path`, or leave `local_path` out"
                )
    node = LocalStorage(root)
    key = f"probe-{secrets.token_hex(8)}"
    try:
        node.put(key, key.encode())
        node.delete(key)
        _clear_root(node)
    except StorageError as error:
        raise ConfigError(
            f"`local_path` {local_path!r} cannot be written on this node: {error}"
        ) from error


def _clear_root(node: Storage) -> None:
    """Remove what processes that died in this check have left; the tiers are their savers' own."""
    for leftover in node.leftovers():
        if "/" not in leftover.path and time.time() - leftover.modified_unix_s >= SILENCE_S:
            node.discard(leftover)


def survey(node: Storage) -> list[NodeDirectory]:
    """Everything that the tier holds, oldest first."""
    names = [(place_of(name), name) for name in node.directories()]
    return [_survey(node, name) for at, name in sorted(
        (at, name) for at, name in names if at is not None
    )]  # fmt: skip


def ranks_on_node(local_path: str, url: str) -> dict[str, tuple[int, ...]]:
    """By checkpoint directory of the store `url`, the ranks whose parts are durable here."""
    found = {item.directory: tuple(sorted(part.rank for part in item.parts))
             for item in survey(open_node(local_path, url))}  # fmt: skip
    return {directory: ranks for directory, ranks in found.items() if ranks}


def mark_sealed(node: Storage, directory: str, digest: str) -> None:
    """Note that the checkpoint is sealed at `path` with that manifest digest (SHA-256, hex)."""
    node.put(f"{directory}/{SEALED_FILE}", json.dumps({"manifest": digest}).encode() + b"\n")


def is_wanted(storage: Storage, ticket: Ticket) -> bool:
    """Whether a save that its saver left on this node is still worth draining to the store.

    Not when a later epoch has begun from before it, or something newer is sealed on the way to the
    newest epoch. What a user has asked for by name is wanted whatever came after.
    """
    if ticket.reason == "explicit":
        return True
    here = Place(ticket.epoch, ticket.step)
    newer = (Place(info.epoch, info.step) for info in scan(storage).sealed)
    return _is_on_lineage(storage, here) and not any(at > here for at in newer)


def is_drained(node: Storage, storage: Storage, part: NodePart) -> bool:
    """Whether the store has this part already, by the bytes of its receipt and the shard's size."""
    key = part.ticket.receipt_path(part.rank)
    try:
        found = storage.get(key, MAX_RECEIPT_BYTES)
        size_bytes = storage.size(part.receipt.shard.path)
    except ObjectNotFoundError:
        return False
    return found == node.get(key, MAX_RECEIPT_BYTES) and size_bytes == part.size_bytes


def drain_part(
    node: Storage, storage: Storage, part: NodePart, on_bytes: Callable[[int], None]
) -> None:
    """Copy a part to the store: the shard, every byte of it verified, and then its receipt.

    Both are durable on return. `on_bytes(so_far)` is called between two pieces; what it raises
    ends the copy, and nothing of it appears. Memory: SPAN_BYTES, or one chunk if that is larger.
    Raises CorruptionError when the node's copy is damaged or a frozen object that it refers to is
    gone from the store, StorageError when the store fails.
    """
    key = part.ticket.receipt_path(part.rank)
    with listed(node, key):
        data = node.get(key, MAX_RECEIPT_BYTES)
    shard = open_shard(node, part.receipt)
    _check_objects(storage, part)
    with storage.writer(shard.path) as writer:
        for piece in _verified(node, shard):
            on_bytes(writer.position)
            writer.write(piece)
        writer.commit()
    storage.put(key, data)
    on_bytes(part.size_bytes)


def _check_objects(storage: Storage, part: NodePart) -> None:
    """Frozen objects are at the store since before the part was written (docs/adr/0008).

    They may be swept when a launch elsewhere has gone on without this node and sealed something.
    """
    for item in part.receipt.objects:
        try:
            is_there = storage.size(item.path) == item.size_bytes
        except ObjectNotFoundError:
            is_there = False
        if not is_there:
            raise CorruptionError(
                f"{place(storage, item.path)}: the frozen object is gone to which rank "
                f"{part.rank} of {part.ticket.directory} refers: something newer has been sealed "
                f"since, so that part can no longer be completed"
            )


def _verified(node: Storage, shard: OpenShard) -> Iterator[memoryview]:
    """The whole file from its beginning, in pieces of whole chunks that have been verified."""
    index, record = shard.index, shard.receipt.shard
    header = encode_header(Header(index.ticket_digest, index.rank, index.world_size, index.minor))
    yield memoryview(header)
    position = HEADER_BYTES
    for group in _groups(index.chunks):
        stop = group[-1].file_stop
        piece = memoryview(bytearray(stop - position))
        with listed(node, shard.path):
            node.read_into(shard.path, position, piece)
        reach = position
        for chunk in group:
            source = f"{place(node, shard.path)}#byte {chunk.file_offset}"
            check_padding(piece[reach - position : chunk.file_offset - position], source)
            frame = piece[chunk.file_offset - position : chunk.file_stop - position]
            check_digest(frame, chunk.stored_digest, key=source)
            reach = chunk.file_stop
        yield piece
        position = stop
    tail = memoryview(bytearray(record.size_bytes - position))
    with listed(node, shard.path):
        node.read_into(shard.path, position, tail)
    source, gap = place(node, shard.path), record.index_offset - position
    check_padding(tail[:gap], f"{source}: before the index")
    if check_tail(shard.receipt, bytes(tail[gap:]), source) != index:
        raise FormatError(f"{source}: the index has changed while the file was read")
    yield tail


def _is_on_lineage(storage: Storage, here: Place) -> bool:
    epochs = read_epochs(storage)
    origins: dict[int, Place | None] = {}
    for epoch in epochs.recorded:
        if epoch > here.epoch:
            try:
                origins[epoch] = read_restored(storage, epoch)
            except CorruptionError:
                continue
    known = {epoch: at for epoch, at in origins.items() if at is None or 1 <= at.epoch < epoch}
    return trace_lineage(max(epochs.newest, here.epoch), known).holds(here)


def _groups(chunks: tuple[ChunkRecord, ...]) -> Iterator[list[ChunkRecord]]:
    """Consecutive chunks of about SPAN_BYTES."""
    group: list[ChunkRecord] = []
    for chunk in chunks:
        if group and chunk.file_stop - group[0].file_offset > SPAN_BYTES:
            yield group
            group = []
        group.append(chunk)
    if group:
        yield group


def _survey(node: Storage, directory: str) -> NodeDirectory:
    parts: list[NodePart] = []
    causes: list[str] = []
    is_sealed = False
    for info in node.list(directory):
        name = info.key.rpartition("/")[2]
        if name == SEALED_FILE:
            is_sealed = _is_mark(node, info.key)
        elif name.endswith(RECEIPT_SUFFIX):
            try:
                parts.append(_part(node, info.key))
            except CorruptionError as error:
                causes.append(str(error))
    return NodeDirectory(directory, tuple(parts), is_sealed, tuple(causes))


def _part(node: Storage, key: str) -> NodePart:
    source = place(node, key)
    receipt = decode_receipt(node.get(key, MAX_RECEIPT_BYTES), source=source)
    if receipt.ticket.receipt_path(receipt.rank) != key:
        raise FormatError(f"{source}: belongs to {receipt.ticket.receipt_path(receipt.rank)}")
    return NodePart(receipt)


def _is_mark(node: Storage, key: str) -> bool:
    """Whether the mark is whole; one that is not says nothing, and `path` is asked again."""
    try:
        return isinstance(json.loads(node.get(key, 4096)), dict)
    except (ValueError, RecursionError, CorruptionError):
        return False
