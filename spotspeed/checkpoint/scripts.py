"""Which script a launch is part of: one that starts its ranks itself may start several at a path.

Processes that multiprocessing starts (a pool, spawned ranks, a fork server's children) belong to
the process that has started them. What one living script does at a path, one world after another
or several at a time, is no job that was started twice by mistake. A world that follows one that has
come to its end is no relaunch of it either: it has a place of its own (`next_place`).

    epochs/000007.script.json      the process whose script epoch 7 is part of; whether it has ended
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from spotspeed.checkpoint.catalog import CheckpointInfo, scan
from spotspeed.checkpoint.marker import is_for_a_directory
from spotspeed.checkpoint.ownership import EPOCHS, Claim, claim_epoch, read_owner, read_record
from spotspeed.checkpoint.processes import (
    identity_of,
    parent_of,
    see_process,
    this_process,
)
from spotspeed.core.documents import stamp
from spotspeed.core.owner import Identity, Process
from spotspeed.errors import CorruptionError, OccupiedError, OwnedError, StorageError
from spotspeed.storage import open_storage
from spotspeed.storage.contract import Storage

_MAX_DEPTH = 64


def this_script() -> Identity:
    """The process whose script this one runs for: its parent if multiprocessing started it."""
    parent = multiprocessing.parent_process()
    pid = None if parent is None else parent.pid
    return this_process() if pid is None else identity_of(pid)


def claim(storage: Storage, *, take_over: bool = False) -> tuple[Claim, bool]:
    """As `claim_epoch`; and whether the launch before was of this script, which is alive.

    Raises OccupiedError, and not OwnedError, when the living owner is another process of it.
    """
    script = this_script()
    try:
        claimed = claim_epoch(storage, take_over=take_over)
    except OwnedError as error:
        owner = read_owner(storage)
        if owner is None or not descends(owner.identity, script):
            raise
        raise OccupiedError(f"{error}; both are of this script: give each a path") from None
    before = claimed.previous
    is_ours = before is not None and _read(storage, before.epoch).get("script") == asdict(script)
    _write(storage, claimed.epoch, script)
    return claimed, is_ours


def end(storage: Storage, epoch: int) -> None:
    """Note that the training of `epoch`, a claim of this process, has come to its end."""
    _write(storage, epoch, this_script(), has_ended=True)


def place(path: str, number: int) -> str:
    """Where the engine of this number, from 1 on, lives of those that a script makes at `path`."""
    return path if number == 1 else f"{path.rstrip('/')}/engine-{number}"


def next_place(path: str, number: int) -> int:
    """The number of the first place, from `number` on, that no earlier world has done with.

    Done with is where a world of this very script has come to its end, or has died and left only
    what was saved to directories of somebody's own, who loads it again when it is wanted. One that
    was interrupted, or died between saves of the job's own, is gone on with.
    """
    script = asdict(this_script())
    while _is_done_with(open_storage(place(path, number)), script):
        number += 1
    return number


def _is_done_with(storage: Storage, script: dict[str, Any]) -> bool:
    owner = read_owner(storage)
    if owner is None:
        return False
    record = _read(storage, owner.epoch)
    if record.get("script") != script:
        return False
    if record.get("has_ended") is True:
        return True
    is_dead = see_process(owner.identity, this_process()) is Process.GONE
    sealed = scan(storage).sealed if is_dead else ()
    return bool(sealed) and belong_to_directories(sealed)


def belong_to_directories(sealed: Collection[CheckpointInfo]) -> bool:
    """Whether each of these was saved to a directory of somebody's own."""
    attempts = ((info.directory.split(".", 2)[2], info.tag) for info in sealed)
    return all(is_for_a_directory(*attempt) for attempt in attempts)


def descends(process: Identity, script: Identity) -> bool:
    """Whether `process`, as far as it lives, was started by `script` or is it."""
    pid: int | None = process.pid
    for _ in range(_MAX_DEPTH):
        if pid is None or not process.is_visible_to(script):
            return False
        if pid == script.pid:
            return True
        pid = parent_of(pid)
    return False


def _write(storage: Storage, epoch: int, script: Identity, *, has_ended: bool = False) -> None:
    body = {"epoch": epoch, "script": asdict(script), "has_ended": has_ended}
    storage.put(_key(epoch), stamp(body))


def _read(storage: Storage, epoch: int) -> dict[str, Any]:
    """What is on record; empty when there is nothing, or nothing that can be read."""
    try:
        return read_record(storage, _key(epoch))
    except (StorageError, CorruptionError):
        return {}


def _key(epoch: int) -> str:
    return f"{EPOCHS}/{epoch:06d}.script.json"
