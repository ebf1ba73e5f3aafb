"""Which checkpoints may go: the `keep` rule, and what an interrupted save or a lost epoch left.

Explicit saves stay until the user removes them, or the marker that stands for them. The newest
sealed checkpoint stays whatever the rule says. What older epochs left unfinished goes once the
running one has sealed something, so that there is always something newer than what is removed; of
the running epoch itself only what nobody can complete any more (`is_hopeless`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from spotspeed.core.frozen import FOLDER
from spotspeed.core.lineage import Place, place_of

SILENCE_S = 3600.0
"""A file that is being written is taken for left behind when nothing came for so long: no store, no
upload and no fsync holds a living writer up that much."""
EVERYTHING = 2**62
"""As `Keep.last`: more than there ever are."""
_BY_RULE = frozenset({"periodic", "notice", "final"})


@dataclass(frozen=True, slots=True)
class Keep:
    """The rule: the newest `last`, and for ever the first at or after each `every_steps`."""

    last: int
    every_steps: int | None = None

    def __post_init__(self) -> None:
        if self.last < 1 or (self.every_steps is not None and self.every_steps < 1):
            raise ValueError(f"keep.last {self.last}, keep.every_steps {self.every_steps}")


@dataclass(frozen=True, slots=True)
class Sealed:
    """A sealed checkpoint, as the rule sees it; `is_on_lineage` as in core/lineage.py."""

    directory: str
    epoch: int
    step: int
    reason: str
    is_on_lineage: bool = True
    is_given_up: bool = False
    """Whether the marker that an explicit save was kept for has been deleted."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A directory without a manifest; `is_hopeless` as that function says it."""

    directory: str
    epoch: int
    is_hopeless: bool = False


@dataclass(frozen=True, slots=True)
class Remains:
    """What is there of a save of the running epoch that is not sealed."""

    directory: str
    step: int
    reason: str | None
    """Of the save, by its receipts; None when no rank's part of it is complete."""
    is_complete: bool
    """Whether every rank's part is, so that it lacks nothing but its manifest."""


@dataclass(frozen=True, slots=True)
class Work:
    """Who may still complete saves of the running epoch."""

    in_flight: frozenset[str] = frozenset()
    """Directories of saves that its first rank waits for."""
    is_over: bool = False
    """Whether no process writes for it any more."""
    has_tiers: bool = True
    """Whether parts may lie on nodes' own disks, to be drained by a saver that starts later."""


@dataclass(frozen=True, slots=True)
class Removal:
    """A directory to remove, and why; a sealed one loses its manifest first."""

    directory: str
    reason: str
    is_sealed: bool


def plan_removal(
    sealed: Sequence[Sealed], unfinished: Sequence[Unfinished], *, keep: Keep, epoch: int
) -> tuple[Removal, ...]:
    """What may be removed while `epoch` is the running one, oldest first.

    `sealed` is newest first. Nothing of an epoch later than `epoch` is named: a launch that has
    been taken over removes nothing.
    """
    newest_here = max((item.epoch for item in sealed), default=0)
    if newest_here > epoch:
        return ()
    on_lineage = [item for item in sealed if item.is_on_lineage]
    stays = _stays(on_lineage, keep) | _last_resort(sealed, on_lineage, epoch)
    given_up = [item for item in sealed if item.is_given_up and item.directory not in stays]
    removals = [
        Removal(item.directory, f"beyond keep.last = {keep.last}", True)
        for item in on_lineage
        if item.reason in _BY_RULE and item.directory not in stays
    ]
    removals += [Removal(item.directory, "its marker was deleted", True) for item in given_up]
    if any(item.epoch == epoch for item in sealed):
        removals += [
            Removal(item.directory, f"not on the way to epoch {epoch}", True)
            for item in sealed
            if not item.is_on_lineage
            and item.epoch < epoch
            and item.reason in _BY_RULE
            and item.directory not in stays
        ]
        removals += [
            Removal(item.directory, f"left unfinished by epoch {item.epoch}", False)
            for item in unfinished
            if item.epoch < epoch
        ]
    removals += [
        Removal(item.directory, "nobody can complete it any more", False)
        for item in unfinished
        if item.epoch == epoch and item.is_hopeless
    ]
    return tuple(sorted(removals, key=lambda removal: removal.directory))


def is_hopeless(remains: Remains, work: Work, *, newest: Place | None) -> bool:
    """Whether a save of the running epoch will never be sealed, so that what is there may go.

    `newest` is the epoch's newest seal. Every rank stores its saves in their order, so when a later
    one is sealed and the first rank waits for this one no more, no rank is going to add to it; but
    for a part that a node's disk still holds, which is drained by a later saver unless something
    newer makes it useless (checkpoint/tiers.py, `is_wanted`). A complete one is sealed instead.
    """
    if remains.is_complete or remains.directory in work.in_flight:
        return False
    is_superseded = newest is not None and remains.step < newest.step
    if work.has_tiers and remains.reason is not None:
        return is_superseded and remains.reason != "explicit"
    return is_superseded or work.is_over


def is_left_behind(
    path: str, *, silent_s: float, sealed: Collection[str], newest: Place | None
) -> bool:
    """Whether what lies unfinished at `path` (storage.contract.Leftover) is nobody's any more.

    Nothing may have been written to it for `silent_s`. In a checkpoint's directory it must be
    sealed: then no part of it is missing. (What is unsealed goes as a whole or stays as a whole,
    by the rule above.) Of frozen objects the save must be older than `newest`, the newest seal of
    the running epoch, as in core/frozen.py. Everywhere else files are small and soon written.
    """
    if silent_s < SILENCE_S:
        return False
    top, _, rest = path.partition("/")
    if place_of(top) is not None:
        return top in sealed
    if top == FOLDER:
        place = place_of(rest.partition("/")[0])
        return place is not None and newest is not None and place < newest
    return True


def _stays(newest_first: Sequence[Sealed], keep: Keep) -> set[str]:
    """Directories on the lineage that the rule keeps."""
    ruled = [item for item in newest_first if item.reason in _BY_RULE]
    stays = {item.directory for item in [*newest_first[:1], *ruled[: keep.last]]}
    if keep.every_steps is not None:
        first_of: dict[int, str] = {}
        for item in ruled:
            # Newest first: the last one written to a bucket is the earliest in it, and stays the
            # earliest when the others of the bucket are removed.
            first_of[item.step // keep.every_steps] = item.directory
        first_of.pop(0, None)
        stays.update(first_of.values())
    return stays


def _last_resort(sealed: Sequence[Sealed], on_lineage: Sequence[Sealed], epoch: int) -> set[str]:
    """The newest checkpoint of a history that this epoch did not continue, if it began anew.

    A script that forgot to restore must not cost the run that it should have continued.
    """
    if any(item.epoch < epoch for item in on_lineage):
        return set()
    others = [item.directory for item in sealed if item.epoch < epoch]
    return set(others[:1])
