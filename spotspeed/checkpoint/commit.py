"""Seals checkpoints: whoever sees all receipts creates the manifest, which is the commit point."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from spotspeed import events
from spotspeed.core.coverage import covers
from spotspeed.core.frozen import FOLDER
from spotspeed.core.lineage import Place, place_of
from spotspeed.core.manifest import (
    MANIFEST_FILE,
    MAX_DOCUMENT_BYTES,
    RECEIPT_SUFFIX,
    Manifest,
    Ticket,
    canonical_json,
    decode_receipt,
    seal_manifest,
)
from spotspeed.errors import (
    CorruptionError,
    FormatError,
    ObjectNotFoundError,
    SpotSpeedError,
    StorageError,
    UnreadableError,
)
from spotspeed.storage.contract import Storage

LATEST_KEY = "latest.json"
"""Not "latest", which is DeepSpeed's: a drop-in save may be told to use the same directory."""
MAX_HINT_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Unsealed:
    """A directory whose save is not complete, and why as far as that is known."""

    directory: str
    cause: str


@dataclass(frozen=True, slots=True)
class RollForward:
    """What `roll_forward` sealed, and what it had to leave."""

    sealed: tuple[Manifest, ...]
    unsealed: tuple[Unsealed, ...]


def try_seal(storage: Storage, ticket: Ticket) -> Manifest | None:
    """Seal `ticket` if every rank's receipt is there; None when one is missing.

    Call it after every receipt that was put. Idempotent, and safe from any number of processes at
    once: the manifest is a pure function of the receipts. When a manifest is returned it is
    durable, and the hint has moved: who is told may remove or copy the folder at once. Raises
    CorruptionError when receipts, shards or an existing manifest contradict each other; the
    checkpoint is then not sealed by this call.
    """
    sizes = {info.key: info.size_bytes for info in storage.list(ticket.directory)}
    if any(ticket.receipt_path(rank) not in sizes for rank in range(ticket.world_size)):
        return None
    receipts = {rank: storage.get(ticket.receipt_path(rank), MAX_DOCUMENT_BYTES)
                for rank in range(ticket.world_size)}  # fmt: skip
    manifest, data = seal_manifest(ticket, receipts)
    sizes |= _check_shards(storage, ticket, receipts, sizes)
    if storage.create(ticket.manifest_path, data):
        if not _holds_all(storage, ticket, sizes):
            # It was collected between the two looks: no manifest may stand for nothing.
            storage.delete(ticket.manifest_path)
            return None
    else:
        found = storage.get(ticket.manifest_path, MAX_DOCUMENT_BYTES)
        if found != data:
            raise CorruptionError(
                f"{storage.url}/{ticket.manifest_path}: there is a manifest of {len(found)} bytes "
                f"that does not follow from the receipts beside it ({len(data)} bytes); "
                f"this checkpoint cannot be trusted"
            )
    _point_latest(storage, manifest)
    return manifest


def withdraw(storage: Storage, directory: str, receipts: Iterable[str]) -> bool:
    """Take these receipts of an unsealed save back, so that nobody can seal it; False if it is.

    A sealer looks for all receipts again after it has created the manifest, and here the manifest
    is looked for after the receipts are gone: of two at once at least one sees the other. What was
    sealed meanwhile gets its receipts back.
    """
    taken: dict[str, bytes] = {}
    for key in receipts:
        try:
            taken[key] = storage.get(key, MAX_DOCUMENT_BYTES)
        except ObjectNotFoundError:
            continue
        storage.delete(key)
    if not _is_sealed(storage, directory):
        return True
    for key, data in taken.items():
        storage.put(key, data)
    return False


def take_back(storage: Storage, ticket: Ticket, rank: int) -> Manifest | None:
    """Remove a rank's part of a save that will not be completed; the manifest if it is, after all.

    The rank itself may have failed only in learning that its receipt is there.
    """
    manifest = try_seal(storage, ticket)
    if manifest is None and withdraw(storage, ticket.directory, [ticket.receipt_path(rank)]):
        storage.delete(ticket.shard_path(rank))
        return None
    return manifest or try_seal(storage, ticket)


def receipt_keys(storage: Storage, directory: str) -> tuple[str, ...]:
    """The receipts that are in `directory`, whatever is in them."""
    keys = (info.key for info in storage.list(directory))
    return tuple(key for key in keys if key.endswith(RECEIPT_SUFFIX))


def receipts_of(storage: Storage, directory: str) -> tuple[Ticket | None, tuple[str, ...]]:
    """The ticket that is saved in `directory`, None without a receipt, and the receipts' keys.

    Raises CorruptionError for a receipt that is damaged or of another directory.
    """
    keys = receipt_keys(storage, directory)
    if not keys:
        return None, ()
    source = f"{storage.url}/{keys[0]}"
    ticket = decode_receipt(storage.get(keys[0], MAX_DOCUMENT_BYTES), source=source).ticket
    if ticket.directory != directory:
        raise FormatError(f"{source}: belongs to {ticket.directory}")
    return ticket, keys


def roll_forward(storage: Storage) -> RollForward:
    """Seal every directory whose receipts are complete: its savers died just before they did.

    A directory that contradicts itself, cannot be read or goes meanwhile is left as it is and
    reported.
    """
    sealed: list[Manifest] = []
    unsealed: list[Unsealed] = []
    for directory in storage.directories():
        try:
            if place_of(directory) is None or _is_sealed(storage, directory):
                continue
            ticket, _ = receipts_of(storage, directory)
            manifest = None if ticket is None else try_seal(storage, ticket)
        except (CorruptionError, UnreadableError, ObjectNotFoundError) as error:
            unsealed.append(Unsealed(directory, str(error)))
            continue
        if manifest is None:
            unsealed.append(Unsealed(directory, "receipts are missing"))
        else:
            sealed.append(manifest)
    return RollForward(tuple(sealed), tuple(unsealed))


def read_latest(storage: Storage) -> tuple[str, str] | None:
    """Directory and manifest digest that `latest` points to: a hint, and perhaps a stale one."""
    try:
        raw = json.loads(storage.get(LATEST_KEY, MAX_HINT_BYTES))
        directory, digest = raw["directory"], raw["digest"]
    except (SpotSpeedError, ValueError, TypeError, KeyError, RecursionError):
        # Nobody depends on the hint, so there is nothing to tell anybody.
        return None
    if not isinstance(directory, str) or not isinstance(digest, str) or not place_of(directory):
        return None
    return directory, digest


def _check_shards(
    storage: Storage, ticket: Ticket, receipts: dict[int, bytes], sizes: dict[str, int]
) -> dict[str, int]:
    """Every shard and object is there in the size that its receipt states, and none too few.

    Returns the objects with their sizes. What the shards hold together is told by their coverage.
    """
    parsed = [decode_receipt(data, source=ticket.receipt_path(rank))
              for rank, data in receipts.items()]  # fmt: skip
    numbers = [receipt.coverage for receipt in parsed if receipt.coverage is not None]
    if len(numbers) == len(parsed) and not covers(numbers):
        raise FormatError(
            f"{storage.url}/{ticket.directory}: the parts of its {len(parsed)} ranks do not fit "
            f"together: some tensor is there only in part or more than once, so it is not sealed; "
            f"that is a fault of spotspeed or of a model that was changed while it was described"
        )
    objects = {item.path: item.size_bytes for receipt in parsed for item in receipt.objects}
    there = dict(sizes)
    if objects:
        there |= {info.key: info.size_bytes for info in storage.list(FOLDER)}
    shards = {receipt.shard.path: receipt.shard.size_bytes for receipt in parsed}
    for path, size_bytes in (shards | objects).items():
        found = there.get(path)
        if found != size_bytes:
            state = "missing" if found is None else f"{found} bytes"
            raise FormatError(f"{storage.url}/{path}: {state}, its receipt says {size_bytes} bytes")
    return objects


def _holds_all(storage: Storage, ticket: Ticket, sizes: dict[str, int]) -> bool:
    there = {info.key: info.size_bytes for info in storage.list(ticket.directory)}
    if sizes.keys() - there.keys():
        there |= {info.key: info.size_bytes for info in storage.list(FOLDER)}
    return sizes.items() <= there.items()


def _is_sealed(storage: Storage, directory: str) -> bool:
    try:
        storage.size(f"{directory}/{MANIFEST_FILE}")
    except ObjectNotFoundError:
        return False
    return True


def _point_latest(storage: Storage, manifest: Manifest) -> None:
    """Move the hint to `manifest`, unless it points to something newer that exists."""
    ticket = manifest.ticket
    try:
        current = read_latest(storage)
        if current == (ticket.directory, manifest.digest):
            return
        if current is not None and _is_newer(storage, current[0], ticket):
            return
        hint = {"directory": ticket.directory, "digest": manifest.digest, "tag": ticket.tag,
                "step": ticket.step, "epoch": ticket.epoch}  # fmt: skip
        storage.put(LATEST_KEY, canonical_json(hint) + b"\n")
    except StorageError as error:
        # The checkpoint is sealed; a hint that could not be moved must not deny that.
        events.emit(events.Lost(f"hint {LATEST_KEY}", str(error)))


def _is_newer(storage: Storage, directory: str, ticket: Ticket) -> bool:
    there = place_of(directory)
    return (
        there is not None
        and there >= Place(ticket.epoch, ticket.step)
        and directory != ticket.directory
        and _is_sealed(storage, directory)
    )
