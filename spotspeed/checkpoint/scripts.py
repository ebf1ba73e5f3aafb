"""Which script a launch is part of: one that starts its ranks itself may start several at a path.

Processes that multiprocessing starts (a pool, spawned ranks, a fork server's children) belong to
the process that has started them. What one living script does at a path, one world after another
or several at a time, is no job that was started twice by mistake.

    epochs/000007.script.json      the process whose script epoch 7 is part of
"""

from __future__ import annotations

import multiprocessing
from dataclasses import asdict
from typing import Any

from spotspeed.checkpoint.ownership import EPOCHS, Claim, claim_epoch, read_owner, read_record
from spotspeed.checkpoint.processes import identity_of, parent_of, this_process
from spotspeed.core.documents import stamp
from spotspeed.core.owner import Identity
from spotspeed.errors import CorruptionError, OccupiedError, OwnedError, StorageError
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
    is_ours = before is not None and _read(storage, before.epoch) == asdict(script)
    storage.put(_key(claimed.epoch), stamp({"epoch": claimed.epoch, "script": asdict(script)}))
    return claimed, is_ours


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


def _read(storage: Storage, epoch: int) -> Any:
    """The script on record, as plain data; None when there is none, or none that can be read."""
    try:
        return read_record(storage, _key(epoch)).get("script")
    except (StorageError, CorruptionError):
        return None


def _key(epoch: int) -> str:
    return f"{EPOCHS}/{epoch:06d}.script.json"
