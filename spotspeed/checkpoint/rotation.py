"""Marker directories that this process deletes: what they stood for may be collected.

Frameworks and scripts that keep the last few checkpoints delete the others by `shutil.rmtree`. It
is watched, in the process that writes markers, below the directories in which it has written one.
A checkpoint is given up only when its own marker was there before the call and is gone after it.

So nothing is concluded from absence: a file system that is not mounted, a directory that was moved
(also by `shutil.move`) or never written gives up nothing. A copy of a marker directory is another
pointer to the same data and does not keep it, but beside the original, where `ds_to_universal` puts
one: while that is there, nothing is given up. Deleting a copy, or what was moved, gives up nothing.
Other processes, and code that took `rmtree` out of shutil before the first marker, are not seen.

    PATH/unmarked/DIRECTORY      says that checkpoint DIRECTORY was given up, for the collector
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotspeed import events
from spotspeed.checkpoint.marker import MARKER_FILE, Marker, attempt_prefix, read_marker
from spotspeed.core.lineage import place_of
from spotspeed.core.manifest import canonical_json
from spotspeed.errors import SpotSpeedError
from spotspeed.storage import open_storage
from spotspeed.storage.contract import Storage

UNMARKED = "unmarked"
_logger = logging.getLogger("spotspeed")
_lock = threading.Lock()
_homes: dict[str, Storage] = {}
"""By directory: the store of what was marked there, or right below it."""
_listeners: dict[str, Callable[[], None]] = {}
"""Who collects, by the store's URL."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A marker at the place for which it was written."""

    path: Path
    marker: Marker
    storage: Storage


def watch(folder: str, storage: Storage) -> None:
    """Markers of checkpoints in `storage` are written into `folder`: notice when they go.

    Directories beside `folder` count as well: that is where a framework keeps the older ones.
    """
    if "://" in folder:
        return  # Nobody deletes there by way of the file system.
    with _lock:
        _homes[folder] = _homes[os.path.dirname(folder)] = storage
        _wrap()


def tell(storage: Storage, listener: Callable[[], None] | None) -> None:
    """Call `listener` when something in `storage` was given up; None: nobody any more."""
    with _lock:
        if listener is None:
            _listeners.pop(storage.url, None)
        else:
            _listeners[storage.url] = listener


def given_up(storage: Storage) -> set[str]:
    """The checkpoint directories whose markers were deleted."""
    keys = (info.key.partition("/")[2] for info in storage.list(UNMARKED))
    return {name for name in keys if place_of(name) is not None}


def forget(storage: Storage, directory: str) -> None:
    """The checkpoint is gone, so there is nothing more to say about it."""
    storage.delete(f"{UNMARKED}/{directory}")


def _wrap() -> None:
    original = shutil.rmtree
    if getattr(original, "_spotspeed_hook", False):
        return

    @functools.wraps(original)
    def rmtree(path: Any, *args: Any, **kwargs: Any) -> Any:
        is_move = sys._getframe(1).f_code is shutil.move.__code__
        found = [] if is_move else list(_originals(path))
        if not found:
            return original(path, *args, **kwargs)
        around = os.path.dirname(os.path.abspath(os.fspath(path)))
        before = _identity(around)
        try:
            return original(path, *args, **kwargs)
        finally:
            # What is around it must be there still, or its absence would say nothing.
            if before is not None and _identity(around) == before:
                _give_up(found)

    rmtree._spotspeed_hook = True  # type: ignore[attr-defined]
    shutil.rmtree = rmtree  # type: ignore[assignment]


def _originals(path: Any) -> Iterator[_Found]:
    """The markers at `path` or up to two levels below it that are where they were written."""
    try:
        root = Path(os.path.abspath(os.fspath(path)))
    except TypeError:
        return  # rmtree will say so.
    with _lock:
        near = [storage for folder, storage in _homes.items()
                if root.is_relative_to(folder) or Path(folder).is_relative_to(root)]  # fmt: skip
    stores = {storage.url: storage for storage in near}
    if not stores:
        return
    for pattern in (MARKER_FILE, f"*/{MARKER_FILE}", f"*/*/{MARKER_FILE}"):
        for file in root.glob(pattern):
            place, tag = str(file.parent.parent), file.parent.name
            try:
                marker = read_marker(open_storage(place), tag)
            except (SpotSpeedError, OSError) as error:
                _logger.info("%s: %s", file, error)
                continue
            storage = None if marker is None else stores.get(marker.url)
            if marker is None or storage is None:
                continue
            is_original = f".{attempt_prefix(place, tag)}" in marker.directory
            if is_original and not _is_named_beside(file, marker, root):
                yield _Found(file, marker, storage)


def _is_named_beside(file: Path, marker: Marker, root: Path) -> bool:
    """Whether another tag of the same folder, outside of `root`, stands for the same data."""
    folder = file.parent.parent
    for other in folder.glob(f"*/{MARKER_FILE}"):
        if other == file or other.is_relative_to(root):
            continue
        try:
            found = read_marker(open_storage(str(folder)), other.parent.name)
        except (SpotSpeedError, OSError) as error:
            _logger.info("%s: %s", other, error)
            continue
        if found is not None and (found.url, found.directory) == (marker.url, marker.directory):
            return True
    return False


def _give_up(found: list[_Found]) -> None:
    for one in found:
        if not _is_gone(one.path):
            continue
        storage, directory = one.storage, one.marker.directory
        note = {"folder": str(one.path.parent.parent), "tag": one.path.parent.name}
        try:
            storage.put(f"{UNMARKED}/{directory}", canonical_json(note) + b"\n")
        except SpotSpeedError as error:
            events.emit(events.Lost(f"the note that {directory} may go", str(error)))
            continue
        with _lock:
            listener = _listeners.get(storage.url)
        if listener is not None:
            listener()


def _is_gone(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _identity(folder: str) -> tuple[int, int] | None:
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino
