"""What checkpoints there are at a path; the manifests alone decide, never `latest`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spotspeed import events
from spotspeed.checkpoint.ownership import read_epochs, read_restored
from spotspeed.checkpoint.parallel import in_parallel
from spotspeed.checkpoint.sealed import open_manifest
from spotspeed.core.lineage import Lineage, Place, place_of, trace_lineage
from spotspeed.core.manifest import Manifest
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
    """A directory whose manifest cannot be read as one."""

    directory: str
    cause: str


@dataclass(frozen=True, slots=True)
class Catalog:
    """All that is at a path, newest first within each group."""

    sealed: tuple[CheckpointInfo, ...]
    """On the lineage of the newest epoch."""
    off_lineage: tuple[CheckpointInfo, ...]
    damaged: tuple[Damaged, ...]
    unsealed: tuple[str, ...]
    """Directories without a manifest: not checkpoints, perhaps being written."""
    newest_epoch: int


def scan(storage: Storage) -> Catalog:
    """Read every manifest at the path, and which epochs lead to the newest one."""
    directories = [name for name in storage.directories() if place_of(name) is not None]
    found = in_parallel(lambda name: _open(storage, name), directories, threads=_THREADS)
    infos = sorted((item for item in found if isinstance(item, CheckpointInfo)), key=_age)
    infos.reverse()
    oldest = min((info.epoch for info in infos), default=1)
    newest = max(read_epochs(storage).newest, max((info.epoch for info in infos), default=0))
    lineage = _lineage(storage, newest, oldest)
    return Catalog(
        sealed=tuple(i for i in infos if lineage.holds(Place(i.epoch, i.step))),
        off_lineage=tuple(i for i in infos if not lineage.holds(Place(i.epoch, i.step))),
        damaged=tuple(item for item in found if isinstance(item, Damaged)),
        unsealed=tuple(name for name, item in zip(directories, found, strict=True)
                       if item is None),
        newest_epoch=newest,
    )  # fmt: skip


def list_sealed(storage: Storage, *, lineage: bool = True) -> list[CheckpointInfo]:
    """The sealed checkpoints, newest first; without `lineage` also those off it, after the others.

    A manifest that is damaged is left out and told in a FellBack event; `scan` returns it.
    """
    catalog = scan(storage)
    for damaged in catalog.damaged:
        events.emit(events.FellBack(damaged.directory, damaged.cause))
    return [*catalog.sealed, *(() if lineage else catalog.off_lineage)]


def find(storage: Storage, tag: str | None = None) -> CheckpointInfo:
    """The newest sealed checkpoint, or the newest of that tag or directory, on the lineage or not.

    Raises ObjectNotFoundError when there is none, saying what there is instead, CorruptionError for
    a directory whose manifest is damaged.
    """
    if tag is not None and place_of(tag) is not None:
        found = _open(storage, tag)
        if isinstance(found, CheckpointInfo):
            return found
        if found is not None:
            raise CorruptionError(f"{storage.url}/{found.directory}: {found.cause}")
    known = list_sealed(storage, lineage=tag is None)
    for info in known:
        if tag is None or tag in (info.tag, info.directory):
            return info
    if tag is None:
        raise ObjectNotFoundError(
            f"{storage.url}: there is no sealed checkpoint; check the path, or run `spotspeed "
            f"list` on it to see what is unfinished or damaged"
        )
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
        return Damaged(directory, str(error))


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
