"""Tidies a path where no job is alive, by what the last one has said about keeping."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from spotspeed.checkpoint.catalog import scan
from spotspeed.checkpoint.commit import receipts_of, roll_forward
from spotspeed.checkpoint.gc import Collected, Scope, collect
from spotspeed.checkpoint.keep_record import KeepRecord, read_keep
from spotspeed.checkpoint.ownership import living_owner, read_owner
from spotspeed.core.owner import is_over
from spotspeed.core.retention import EVERYTHING, SILENCE_S, Keep, Work
from spotspeed.errors import CorruptionError, FormatError, OwnedError
from spotspeed.storage.contract import Storage


@dataclass(frozen=True, slots=True)
class Wish:
    """What a person asks for; None: as the job has said. `every_steps` 0: none for ever."""

    keep_last: int | None = None
    every_steps: int | None = None
    is_dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Tidied:
    """What was removed, or would be; by which rule; and what was sealed before, or would be."""

    collected: Collected
    keep: Keep
    sealed: tuple[str, ...]
    notes: tuple[str, ...]
    """What was left alone, and why, in words."""


def tidy(storage: Storage, wish: Wish) -> Tidied:
    """Seal what lacks only its manifest, then remove what is not kept and what crashes have left.

    Raises OwnedError when a job is alive there (not in a dry run, which then tells what the rule
    alone would remove), FormatError when what the job has said is damaged.
    """
    owner = living_owner(storage)
    if owner is not None and not wish.is_dry_run:
        raise OwnedError(
            f"{storage.url}: a job is alive there (epoch {owner.epoch} on {owner.identity.host}, "
            f"pid {owner.identity.pid}); it removes old checkpoints by itself, as its `keep` says"
        )
    record = _record(storage, wish)
    notes = [] if wish.keep_last or record.keep.last < EVERYTHING else [
        "no job has said at this path what it keeps, so no sealed checkpoint is removed: say "
        "--keep-last N"
    ]  # fmt: skip
    done = _seal(storage, wish, is_alive=owner is not None)
    work = None
    if owner is None:
        last = read_owner(storage)
        has_ended = is_over(last, now_unix_s=int(time.time()), silence_s=SILENCE_S)
        work = Work(is_over=has_ended, has_tiers=record.has_tiers)
    # Checkpoints that were imported or saved without a job are of epochs that nobody has claimed.
    catalog = scan(storage)
    keep = _overridden(record.keep, wish)
    collected = collect(storage, keep, epoch=catalog.newest_epoch, dry_run=wish.is_dry_run,
                        scope=Scope(work=work))  # fmt: skip
    gone = {removal.directory for removal in collected.removals} | {*done}
    left = [name for name in catalog.unsealed if name not in gone]
    if left:
        notes.append(_why_left(left, work))
    return Tidied(collected, keep, done, tuple(notes))


def _seal(storage: Storage, wish: Wish, *, is_alive: bool) -> tuple[str, ...]:
    """The directories that lacked only their manifest; sealed, but for a dry run."""
    if not wish.is_dry_run:
        return tuple(item.ticket.directory for item in roll_forward(storage).sealed)
    if is_alive:
        return ()
    return tuple(name for name in scan(storage).unsealed if _is_complete(storage, name))


def _is_complete(storage: Storage, directory: str) -> bool:
    try:
        ticket, receipts = receipts_of(storage, directory)
    except CorruptionError:
        return False
    return ticket is not None and len(receipts) == ticket.world_size


def _record(storage: Storage, wish: Wish) -> KeepRecord:
    try:
        found = read_keep(storage)
    except FormatError as error:
        if wish.keep_last is None or wish.every_steps is None:
            raise FormatError(f"{error}; say --keep-last and --every-steps") from error
        found = None
    return found or KeepRecord(Keep(EVERYTHING), has_tiers=True)


def _overridden(keep: Keep, wish: Wish) -> Keep:
    if wish.keep_last is not None:
        keep = replace(keep, last=wish.keep_last)
    if wish.every_steps is not None:
        keep = replace(keep, every_steps=wish.every_steps or None)
    return keep


def _why_left(left: list[str], work: Work | None) -> str:
    what = f"left unfinished: {', '.join(left)}: "
    if work is None:
        return what + "a job is alive"
    if not work.is_over:
        return what + (
            f"the last job there has not closed, and other nodes' savers may still write until "
            f"nothing was heard of it for {SILENCE_S / 60:.0f} minutes"
        )
    if work.has_tiers:
        return what + "a node's own disk may hold the rest, which the next launch there brings"
    return what + "nothing newer is sealed, or it contradicts itself"
