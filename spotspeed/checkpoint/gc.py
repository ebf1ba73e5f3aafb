"""Removes what core/retention.py says may go: the manifest first, so that a crash tears nothing."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from spotspeed.checkpoint.catalog import Catalog, CheckpointInfo, scan
from spotspeed.checkpoint.commit import receipt_keys, receipts_of, withdraw
from spotspeed.checkpoint.ownership import read_epochs
from spotspeed.checkpoint.rotation import forget, given_up
from spotspeed.checkpoint.sweep import Sweeper
from spotspeed.core.frozen import FOLDER
from spotspeed.core.lineage import Place, place_of
from spotspeed.core.manifest import MANIFEST_FILE
from spotspeed.core.retention import (
    Keep,
    Remains,
    Removal,
    Sealed,
    Unfinished,
    Work,
    is_hopeless,
    is_left_behind,
    plan_removal,
)
from spotspeed.errors import CorruptionError, ObjectNotFoundError, OwnedError
from spotspeed.storage.contract import Leftover, Storage

EXPLICIT = "explicit"


@dataclass(frozen=True, slots=True)
class Collected:
    """What was removed, or would be in a dry run."""

    removals: tuple[Removal, ...]
    size_bytes: int
    """Bytes of the objects that went; 0 for a directory that somebody else removed meanwhile."""
    frozen: tuple[str, ...] = ()
    """Frozen objects that went because nothing refers to them any more."""
    leftovers: tuple[str, ...] = ()
    """What writes that never ended had left, by its path."""


@dataclass(frozen=True, slots=True)
class Scope:
    """How far a collection goes beside the rule."""

    is_thorough: bool = True
    """Whether all of the path is searched for what crashed writes have left."""
    work: Work | None = None
    """As it was before the collection: tells which of the epoch's unfinished saves are hopeless;
    None: none is."""


def collect(
    storage: Storage, keep: Keep, *, epoch: int, dry_run: bool = False,
    sweeper: Sweeper | None = None, scope: Scope = Scope(),
) -> Collected:  # fmt: skip
    """Apply the rule on behalf of `epoch`, which must be the newest one, and sweep what it frees.

    Only the launch that owns the path may call it, or a command line that has made sure that
    nobody does (`ownership.living_owner`). Raises OwnedError when a later epoch has begun, before
    anything is removed; StorageError leaves a part of a directory, which a later run removes.
    """
    catalog = scan(storage)
    unmarked = given_up(storage)
    newest = max((Place(info.epoch, info.step) for info in _all(catalog) if info.epoch == epoch),
                 default=None)  # fmt: skip
    unfinished = _unfinished(storage, catalog, scope.work, newest)
    removals = plan_removal(_sealed(catalog, unmarked), unfinished, keep=keep, epoch=epoch)
    size_bytes = 0
    for removal in removals:
        if not dry_run:
            _check_newest(storage, epoch)
        size_bytes += sum(info.size_bytes for info in storage.list(removal.directory))
        if not dry_run:
            _remove(storage, removal)
            if removal.directory in unmarked:
                forget(storage, removal.directory)
    sweeper = sweeper or Sweeper(storage, is_patient=False)
    gone = [removal.directory for removal in removals]
    swept = sweeper.sweep(newest, gone=gone, dry_run=dry_run)
    size_bytes += swept.size_bytes
    left: tuple[Leftover, ...] = ()
    if scope.is_thorough:
        left = _left_behind(storage, {info.directory for info in _all(catalog)}, newest, gone)
        if left and not dry_run:
            _check_newest(storage, epoch)
            _discard(storage, left)
    size_bytes += sum(leftover.size_bytes for leftover in left)
    return Collected(removals, size_bytes, swept.paths, tuple(item.path for item in left))


def _left_behind(
    storage: Storage, sealed: Collection[str], newest: Place | None, gone: Collection[str]
) -> tuple[Leftover, ...]:
    """What is unfinished and nobody's, but for what the directories in `gone` take along."""
    now = time.time()
    return tuple(
        item
        for item in storage.leftovers()
        if item.path.partition("/")[0] not in gone
        and is_left_behind(
            item.path, silent_s=now - item.modified_unix_s, sealed=sealed, newest=newest
        )
    )


def _discard(storage: Storage, left: Sequence[Leftover]) -> None:
    for leftover in left:
        storage.discard(leftover)
    for folder in {item.path.rpartition("/")[0] for item in left}:
        # Objects of such a save that were completed are there; where none was, nobody looks again.
        if folder.startswith(f"{FOLDER}/") and not storage.list(folder):
            storage.delete_prefix(folder)


def _all(catalog: Catalog) -> tuple[CheckpointInfo, ...]:
    return (*catalog.sealed, *catalog.off_lineage)


def _remove(storage: Storage, removal: Removal) -> None:
    directory = removal.directory
    if removal.is_sealed:
        # From here on it is no checkpoint any more; a crash leaves an unfinished one at worst.
        storage.delete(f"{directory}/{MANIFEST_FILE}")
    elif not withdraw(storage, directory, receipt_keys(storage, directory)):
        return
    storage.delete_prefix(directory)


def _check_newest(storage: Storage, epoch: int) -> None:
    newest = read_epochs(storage).newest
    if newest > epoch:
        raise OwnedError(
            f"{storage.url}: epoch {newest} has begun, so epoch {epoch} removes nothing any more"
        )


def _sealed(catalog: Catalog, unmarked: Collection[str]) -> list[Sealed]:
    def seen(info: CheckpointInfo, is_on_lineage: bool) -> Sealed:
        is_given_up = info.reason == EXPLICIT and info.directory in unmarked
        return Sealed(
            info.directory, info.epoch, info.step, info.reason, is_on_lineage, is_given_up
        )

    both = [seen(info, True) for info in catalog.sealed]
    both += [seen(info, False) for info in catalog.off_lineage]
    return sorted(both, key=lambda item: (item.epoch, item.step, item.directory), reverse=True)


def _unfinished(
    storage: Storage, catalog: Catalog, work: Work | None, newest: Place | None
) -> list[Unfinished]:
    found: list[Unfinished] = []
    for directory in catalog.unsealed:
        at = place_of(directory)
        assert at is not None
        is_lost = False
        if work is not None and at.epoch == catalog.newest_epoch:
            is_lost = is_hopeless(_remains(storage, directory, at.step), work, newest=newest)
        found.append(Unfinished(directory, at.epoch, is_lost))
    return found


def _remains(storage: Storage, directory: str, step: int) -> Remains:
    try:
        ticket, receipts = receipts_of(storage, directory)
    except (CorruptionError, ObjectNotFoundError):
        # Nobody can seal it, but somebody may want to see what is wrong with it.
        return Remains(directory, step, None, is_complete=True)
    if ticket is None:
        return Remains(directory, step, None, is_complete=False)
    return Remains(directory, step, ticket.reason, len(receipts) == ticket.world_size)
