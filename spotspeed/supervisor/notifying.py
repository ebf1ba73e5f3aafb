"""Tells the jobs of this machine that it goes away, and waits until they are durable."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from spotspeed.checkpoint.catalog import scan
from spotspeed.checkpoint.ownership import read_epochs, read_owner
from spotspeed.core.lineage import place_of
from spotspeed.core.manifest import MAX_STEP
from spotspeed.errors import SpotSpeedError, StorageError
from spotspeed.staging.client import find_saver
from spotspeed.staging.launch import saver_address
from spotspeed.storage import open_storage
from spotspeed.storage.contract import Storage

_logger = logging.getLogger("spotspeed")
SOURCE = "notify"
LOOK_S = 0.25
NOTICE_REASON = "notice"


@dataclass(frozen=True, slots=True)
class Told:
    """A job that has heard the notice; `epoch` is its launch."""

    path: str
    epoch: int


def paths_here() -> list[str]:
    """Paths of the checkpoints that savers of this user serve on this machine."""
    found: dict[str, None] = {}
    for name in os.listdir("/proc"):
        # A process may end, or belong to somebody else, at any of these reads.
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{int(name)}/cmdline", "rb") as file:
                words = [os.fsdecode(word) for word in file.read().split(b"\0")]
            if "spotspeed.agent" in words:
                path = words[words.index("--path") + 1]
                if words[words.index("--socket") + 1] == saver_address(path):
                    found[path] = None
    return list(found)


def notify(path: str, *, seconds_left: float | None) -> Told:
    """Tell every rank of this machine that trains into `path`; returns at once.

    `seconds_left` None: as the job's `notice.deadline_s` says. Raises StorageError when no saver
    of this user serves that path here: there is no job, or it has left already.
    """
    session = find_saver(path)
    if session is None:
        raise StorageError(f"no job on this machine has its checkpoints at {path}")
    with contextlib.closing(session):
        epoch = read_epochs(open_storage(path)).newest
        session.notify(seconds_left or 0.0, SOURCE)
    return Told(path, epoch)


def notify_all(paths: Iterable[str], *, seconds_left: float | None) -> list[Told]:
    """Tell the jobs at all `paths`; who has left since it was found needs no notice."""
    told: list[Told] = []
    for path in paths:
        try:
            told.append(notify(path, seconds_left=seconds_left))
        except SpotSpeedError as error:
            _logger.warning("%s: not told: %s", path, error)
    return told


def tell_saver(path: str, *, seconds_left: float) -> bool:
    """Let the saver of `path` tell its ranks; False when no saver of this user serves it here."""
    session = find_saver(path)
    if session is None:
        return False
    with contextlib.closing(session):
        session.notify(seconds_left, SOURCE)
    return True


def wait_durable(
    told: Told, *, timeout_s: float, sleep: Callable[[float], None] = time.sleep
) -> bool:
    """Wait until the state of the notice is durable at the job's path; False when it is not.

    True as soon as a notice's checkpoint of this launch is sealed. When the ranks have left
    without one, because the agreed step had been saved for another reason, what they left counts.
    """
    storage, deadline = open_storage(told.path), time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(StorageError):
            if _is_notice_sealed(storage, told):
                return True
            owner = read_owner(storage)
            if owner is None or owner.epoch != told.epoch or owner.state != "training":
                _drain(told.path, deadline)
                is_released = owner is not None and owner.state == "released"
                return _is_notice_sealed(storage, told) or (
                    is_released and is_nothing_unsealed(storage, told.epoch)
                )
        sleep(LOOK_S)
    return False


def is_nothing_unsealed(storage: Storage, epoch: int) -> bool:
    """Whether there is a sealed checkpoint, and none of `epoch` newer than it is unfinished."""
    catalog = scan(storage)
    places = [place_of(name) for name in catalog.unsealed]
    open_steps = [place.step for place in places if place is not None and place.epoch == epoch]
    return bool(catalog.sealed) and max(open_steps, default=-1) < catalog.sealed[0].step


def _is_notice_sealed(storage: Storage, told: Told) -> bool:
    return any(
        info.epoch == told.epoch and info.reason == NOTICE_REASON for info in scan(storage).sealed
    )


def _drain(path: str, deadline: float) -> None:
    """Wait for what the saver of this node still writes; a saver that is gone has written it."""
    with contextlib.suppress(SpotSpeedError):
        session = find_saver(path)
        if session is not None:
            with contextlib.closing(session):
                session.drain(MAX_STEP, timeout_s=max(0.0, deadline - time.monotonic()))
