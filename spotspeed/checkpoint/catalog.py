"""What checkpoints there are at a path; the manifests alone decide, never `latest`."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from spotspeed import events
from spotspeed.checkpoint.commit import LATEST_KEY, read_latest, receipts_of, roll_forward
from spotspeed.checkpoint.ownership import read_epochs, read_restored
from spotspeed.checkpoint.parallel import in_parallel
from spotspeed.checkpoint.sealed import open_manifest
from spotspeed.core.lineage import Lineage, Place, place_of, trace_lineage
from spotspeed.core.manifest import MANIFEST_FILE, Manifest
from spotspeed.errors import CorruptionError, FormatError, ObjectNotFoundError, UnreadableError
from spotspeed.storage.contract import Storage

_THREADS = 8
_NUMBERED = re.compile(r"-(\d{1,18})$")


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One sealed checkpoint."""

    directory: str
    tag: str
    step: int
    epoch: int
    reason: str
    world_size: int
    size_bytes: int
    """Bytes of all shards."""
    digest: str
    """SHA-256 (hex) of the sealed manifest."""
    created_unix_s: int
    object_bytes: int = 0
    """Bytes of the frozen objects that it refers to, which other checkpoints may share."""


@dataclass(frozen=True, slots=True)
class Damaged:
    """A directory that was sealed and whose manifest cannot be read as one, or is gone."""

    directory: str
    cause: str
    tag: str = ""
    """What its receipts say, which nothing vouches for; "" when they say nothing."""

    def is_called(self, name: str) -> bool:
        """Whether `name` is its directory or its tag."""
        return name in (self.directory, self.tag)


@dataclass(frozen=True, slots=True)
class Catalog:
    """All that is at a path, newest first within each group."""

    sealed: tuple[CheckpointInfo, ...]
    """On the lineage of the newest epoch."""
    off_lineage: tuple[CheckpointInfo, ...]
    damaged: tuple[Damaged, ...]
    unsealed: tuple[str, ...]
    """Directories without a manifest: not checkpoints, perhaps being written."""
    lost: tuple[Damaged, ...]
    """Those of them of which `latest` says that they were sealed; they lead to the newest epoch."""
    newest_epoch: int


def scan(storage: Storage) -> Catalog:
    """Read every manifest at the path, and which epochs lead to the newest one."""
    # Before all others: what it names was sealed when they are looked at.
    latest = read_latest(storage)
    directories = [name for name in storage.directories() if place_of(name) is not None]
    found = in_parallel(lambda name: _open(storage, name), directories, threads=_THREADS)
    infos = sorted((item for item in found if isinstance(item, CheckpointInfo)), key=_age)
    infos.reverse()
    oldest = min((info.epoch for info in infos), default=1)
    newest = max(read_epochs(storage).newest, max((info.epoch for info in infos), default=0))
    lineage = _lineage(storage, newest, oldest)
    unsealed = tuple(name for name, item in zip(directories, found, strict=True) if item is None)
    lost = () if latest is None else _lost(storage, latest, unsealed, lineage)
    return Catalog(
        sealed=tuple(i for i in infos if lineage.holds(Place(i.epoch, i.step))),
        off_lineage=tuple(i for i in infos if not lineage.holds(Place(i.epoch, i.step))),
        damaged=tuple(item for item in found if isinstance(item, Damaged)),
        unsealed=unsealed,
        lost=lost,
        newest_epoch=newest,
    )  # fmt: skip


def scan_mended(storage: Storage) -> Catalog:
    """As `scan`, after a manifest that is lost was made again where all receipts are there."""
    catalog = scan(storage)
    if not catalog.lost:
        return catalog
    roll_forward(storage)
    return scan(storage)


def list_sealed(storage: Storage, *, lineage: bool = True) -> list[CheckpointInfo]:
    """The sealed checkpoints, newest first; without `lineage` also those off it, after the others.

    A manifest that is damaged or gone is left out and told in a FellBack event; `scan` returns it.
    """
    return _told(scan(storage), lineage=lineage)


def _told(catalog: Catalog, *, lineage: bool) -> list[CheckpointInfo]:
    for damaged in (*catalog.lost, *catalog.damaged):
        events.emit(events.FellBack(damaged.directory, damaged.cause))
    return [*catalog.sealed, *(() if lineage else catalog.off_lineage)]


def find(storage: Storage, tag: str | None = None) -> CheckpointInfo:
    """The newest sealed checkpoint, or the newest of that tag or directory, on the lineage or not.

    Raises ObjectNotFoundError when there is none, saying what there is instead, CorruptionError
    when only one whose manifest is damaged or gone has that name.
    """
    if tag is not None and place_of(tag) is not None:
        found = _open(storage, tag)
        if isinstance(found, CheckpointInfo):
            return found
        if found is not None:
            raise CorruptionError(f"{storage.url}/{found.directory}: {found.cause}")
    catalog = scan(storage)
    known = _told(catalog, lineage=tag is None)
    for info in known:
        if tag is None or tag in (info.tag, info.directory):
            return info
    if tag is None:
        raise ObjectNotFoundError(
            f"{storage.url}: there is no sealed checkpoint; check the path, or run `spotspeed "
            f"list` on it to see what is unfinished or damaged"
        )
    for damaged in (*catalog.lost, *catalog.damaged):
        if damaged.is_called(tag):
            raise CorruptionError(f"{storage.url}/{damaged.directory}: {damaged.cause}")
    there = ", ".join(dict.fromkeys(info.tag for info in known[:8])) or "nothing"
    raise ObjectNotFoundError(
        f"{storage.url}: there is no sealed checkpoint with tag {tag!r}; newest first there is: "
        f"{there}"
    )


def _open(storage: Storage, directory: str) -> CheckpointInfo | Damaged | None:
    try:
        return describe(open_manifest(storage, directory))
    except ObjectNotFoundError:
        return None
    except CorruptionError as error:
        return Damaged(directory, str(error), _tag_of(storage, directory))


def _tag_of(storage: Storage, directory: str) -> str:
    try:
        ticket, _ = receipts_of(storage, directory)
    except (CorruptionError, UnreadableError, ObjectNotFoundError):
        return ""
    return "" if ticket is None else ticket.tag


def _lost(
    storage: Storage, latest: tuple[str, str], unsealed: Collection[str], lineage: Lineage
) -> tuple[Damaged, ...]:
    """The directory that `latest` names, when its manifest alone is gone."""
    directory, digest = latest
    place = place_of(directory)
    if directory not in unsealed or place is None or not lineage.holds(place):
        return ()
    if not storage.list(directory):
        return ()  # It was removed meanwhile.
    cause = (
        f"{MANIFEST_FILE} is gone: {LATEST_KEY} says that this checkpoint was sealed, with digest "
        f"{digest}; the next launch seals it again if all receipts are there, else remove it"
    )
    return (Damaged(directory, cause, _tag_of(storage, directory)),)


def describe(manifest: Manifest) -> CheckpointInfo:
    """The catalogue's entry for `manifest`."""
    ticket = manifest.ticket
    return CheckpointInfo(ticket.directory, ticket.tag, ticket.step, ticket.epoch, ticket.reason,
                          ticket.world_size, manifest.data_bytes, manifest.digest,
                          ticket.created_unix_s, manifest.object_bytes)  # fmt: skip


def _age(info: CheckpointInfo) -> tuple[int, int, int, int, str]:
    # Each launch numbers its saves by name, so that those of one second have an order.
    numbered = _NUMBERED.search(info.directory)
    number = int(numbered[1]) if numbered else 0
    return info.epoch, info.step, info.created_unix_s, number, info.directory


def _lineage(storage: Storage, newest: int, oldest: int) -> Lineage:
    """The path back from epoch `newest`, as far as epoch `oldest`."""
    recorded = read_epochs(storage).recorded
    wanted = [epoch for epoch in sorted(recorded) if oldest <= epoch <= newest]
    origins = in_parallel(lambda epoch: _origin(storage, epoch), wanted, threads=_THREADS)
    return trace_lineage(newest, {epoch: origin for epoch, origin in zip(wanted, origins,
                                  strict=True) if not isinstance(origin, Damaged)})  # fmt: skip


def _origin(storage: Storage, epoch: int) -> Place | Damaged | None:
    """Where `epoch` began; a record that is damaged bounds nothing, and is told."""
    try:
        origin = read_restored(storage, epoch)
        if origin is not None and not 1 <= origin.epoch < epoch:
            raise FormatError(f"epoch {epoch} cannot have begun from epoch {origin.epoch}")
    except (CorruptionError, UnreadableError) as error:
        events.emit(events.FellBack(f"record of epoch {epoch}", str(error)))
        return Damaged(f"epoch {epoch}", str(error))
    return origin
