"""Removes frozen objects that no checkpoint refers to any more: mark over receipts, then sweep.

What marks is every receipt that is there, of sealed checkpoints and of those being written. A
receipt that cannot be read keeps everything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

from spotspeed import events
from spotspeed.core.frozen import FOLDER, plan_sweep, writer_of
from spotspeed.core.lineage import Place, place_of
from spotspeed.core.manifest import MAX_RECEIPT_BYTES, RECEIPT_SUFFIX, decode_receipt
from spotspeed.errors import CorruptionError, ObjectNotFoundError, StorageError, UnreadableError
from spotspeed.storage.contract import ObjectInfo, Storage


@dataclass(frozen=True, slots=True)
class Swept:
    """Objects that went, or would in a dry run."""

    paths: tuple[str, ...] = ()
    size_bytes: int = 0


class Sweeper:
    """Sweeps one store again and again; receipts, which never change, are read once.

    A patient one removes what it has found unreferred twice, with another seal in between, and does
    nothing unless `is_quiet()`, that is while no save is between its beginning and its seal: what a
    save refers to before its receipt says so is then never taken away from under it.
    """

    def __init__(
        self, storage: Storage, *, is_patient: bool, is_quiet: Callable[[], bool] = lambda: True
    ) -> None:
        self._storage, self._is_patient, self._is_quiet = storage, is_patient, is_quiet
        self._read: dict[str, frozenset[str]] = {}
        self._suspects: frozenset[str] = frozenset()

    def sweep(
        self, newest: Place | None, *, gone: Collection[str] = (), dry_run: bool = False
    ) -> Swept:
        """Remove what may go when `newest` is the newest seal of the running epoch.

        `gone` are directories to be taken for removed. Raises StorageError; a later sweep goes on.
        """
        if not self._is_quiet():
            return Swept()
        present = {info.key: info for info in self._storage.list(FOLDER)}
        garbage = plan_sweep(present, (), newest=newest)
        if garbage:
            referred = self._referred(gone)
            garbage = frozenset() if referred is None else garbage - referred
        suspects, self._suspects = self._suspects, garbage
        if self._is_patient:
            garbage &= suspects
        for key in sorted(() if dry_run else garbage):
            self._storage.delete(key)
        if not dry_run:
            self._remove_empty(present, garbage)
        return Swept(tuple(sorted(garbage)), sum(present[key].size_bytes for key in garbage))

    def _referred(self, gone: Collection[str]) -> frozenset[str] | None:
        """Every object that some receipt refers to; None when that cannot be known."""
        found: dict[str, frozenset[str]] = {}
        try:
            for directory in self._storage.directories():
                if place_of(directory) is None or directory in gone:
                    continue
                for info in self._storage.list(directory):
                    if info.key.endswith(RECEIPT_SUFFIX):
                        found[info.key] = self._read.get(info.key) or self._objects_of(info.key)
        except (CorruptionError, UnreadableError) as error:
            events.emit(events.Lost("frozen objects were not swept", str(error)))
            return None
        self._read = found
        return frozenset().union(*found.values())

    def _objects_of(self, key: str) -> frozenset[str]:
        try:
            data = self._storage.get(key, MAX_RECEIPT_BYTES)
        except ObjectNotFoundError:  # its directory is being removed
            return frozenset()
        receipt = decode_receipt(data, source=f"{self._storage.url}/{key}")
        return frozenset(item.path for item in receipt.objects)

    def _remove_empty(self, present: dict[str, ObjectInfo], garbage: frozenset[str]) -> None:
        """Directories of saves all of whose objects are gone; no save ever writes there again."""
        left = {writer_of(key) for key in present.keys() - garbage}
        for writer in {writer_of(key) for key in garbage} - left:
            with contextlib.suppress(StorageError):
                self._storage.delete_prefix(f"{FOLDER}/{writer}")
