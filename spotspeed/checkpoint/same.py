"""Saves of one (path, tag, step) with the same content are one stored checkpoint: the newest.

Content is what the shards' indexes say of the raw bytes: no data is read. Another client state, or
a generator that was used in between, is other content, and both stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spotspeed import events
from spotspeed.checkpoint.sealed import open_manifest, open_receipt, open_shard
from spotspeed.core.lineage import place_of
from spotspeed.core.manifest import MANIFEST_FILE, Manifest
from spotspeed.errors import CorruptionError, ObjectNotFoundError, SpotSpeedError
from spotspeed.storage.contract import Storage


def keep_one(storage: Storage, manifest: Manifest, prefix: str) -> Manifest:
    """Remove older saves of the same step and content, and return the newest of them.

    Their attempts are `prefix` and a number. If something hinders it, that is an event.
    """
    kept = manifest
    try:
        for directory in _beside(storage, manifest, prefix):
            try:
                other = open_manifest(storage, directory)
                if not holds_same(storage, kept, other):
                    continue
            except (CorruptionError, ObjectNotFoundError):
                continue  # Damaged, or not sealed: that is for others to judge.
            older, kept = sorted((kept, other), key=lambda item: _age(item, prefix))
            storage.delete(f"{older.ticket.directory}/{MANIFEST_FILE}")
            storage.delete_prefix(older.ticket.directory)
    except SpotSpeedError as error:
        what = f"a second copy of {kept.ticket.tag!r} was not removed"
        events.emit(events.Lost(what, str(error)))
    return kept


def holds_same(storage: Storage, one: Manifest, other: Manifest) -> bool:
    """Whether every rank has written the same tensors, bit for bit, in the same order."""
    ranks = one.ticket.world_size
    return ranks == other.ticket.world_size and all(
        _content(storage, one, rank) == _content(storage, other, rank) for rank in range(ranks)
    )


def _beside(storage: Storage, manifest: Manifest, prefix: str) -> Iterator[str]:
    """Directories of other attempts at the same."""
    ticket = manifest.ticket
    for directory in storage.directories():
        at = place_of(directory)
        number = directory.rpartition(f".{prefix}")[2]
        is_other = at is not None and at.step == ticket.step and directory != ticket.directory
        if is_other and number.isdigit():
            yield directory


def _age(manifest: Manifest, prefix: str) -> tuple[int, int]:
    return manifest.ticket.epoch, int(manifest.ticket.attempt.removeprefix(prefix))


def _content(storage: Storage, manifest: Manifest, rank: int) -> tuple[Any, ...]:
    receipt = open_receipt(storage, manifest, rank)
    index = open_shard(storage, receipt).index
    chunks = tuple(
        (chunk.raw_offset, chunk.raw_size, chunk.raw_digest or chunk.stored_digest)
        for chunk in index.chunks
    )
    return index.entries, chunks, tuple(item.content for item in receipt.objects)
