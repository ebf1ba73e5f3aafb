"""Claims a path for one launch of the job, keeps the claim alive, and records where it began.

    epochs/000007.json            created once: the claim (who, when)
    epochs/000007.restored.json   created once: the checkpoint that this epoch began from
    owner.json                    the newest claim, put again with a higher counter each period

The creation of the epoch's record decides every race; `owner.json` only shows life. All
decisions are core/owner.py's.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from spotspeed import events
from spotspeed.checkpoint.processes import see_process, this_process
from spotspeed.core.documents import check_stamp, stamp
from spotspeed.core.lineage import Place, place_of
from spotspeed.core.owner import (
    MAX_RECORD_BYTES,
    Decision,
    Identity,
    Observation,
    OwnerRecord,
    State,
    Verdict,
    decode_owner,
    encode_owner,
    may_take_over,
)
from spotspeed.errors import (
    FormatError,
    ObjectNotFoundError,
    OwnedError,
    StorageError,
    UnreadableError,
)
from spotspeed.storage.contract import Storage

EPOCHS = "epochs"
OWNER_KEY = "owner.json"
RENEWAL_PERIOD_S = 5.0
_EPOCH_KEY = re.compile(rf"{EPOCHS}/(\d{{6,16}})(\.restored)?\.json")


@dataclass(frozen=True, slots=True)
class Clock:
    """Time as the claim sees it; replaced in tests."""

    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    unix: Callable[[], float] = time.time


@dataclass(frozen=True, slots=True)
class Claim:
    """An epoch that this launch owns, and why it was free to take."""

    record: OwnerRecord
    previous: OwnerRecord | None
    reason: str

    @property
    def epoch(self) -> int:
        return self.record.epoch


@dataclass(frozen=True, slots=True)
class Epochs:
    """What the store says about the launches so far."""

    newest: int
    """0 when there has been none."""
    recorded: frozenset[int] = field(default_factory=frozenset)
    """Epochs that have recorded where they began."""


def epoch_key(epoch: int) -> str:
    return f"{EPOCHS}/{epoch:06d}.json"


def restored_key(epoch: int) -> str:
    return f"{EPOCHS}/{epoch:06d}.restored.json"


def claim_epoch(
    storage: Storage,
    *,
    take_over: bool = False,
    period_s: float = RENEWAL_PERIOD_S,
    identity: Identity | None = None,
    clock: Clock | None = None,
) -> Claim:
    """Claim the path for this process as the next epoch; durable on return.

    A dead owner on this machine is replaced at once, a silent one elsewhere after two of its
    renewal periods. `period_s` is how often this claim is going to be renewed (`renew`). Raises
    OwnedError when another job is alive there, naming it, and `take_over` is not set.
    """
    identity = this_process() if identity is None else identity
    clock = Clock() if clock is None else clock
    while True:
        # Looked at before the owner is judged: a claim made after that must win the race below.
        newest = read_epochs(storage).newest
        previous, reason = _wait_for_turn(storage, identity, clock, take_over)
        now = int(clock.unix())
        epoch = max(newest, previous.epoch if previous else 0) + 1
        record = OwnerRecord(epoch, identity, secrets.token_hex(8), "training", 0, period_s,
                             now, now)  # fmt: skip
        if _create_exactly(storage, epoch_key(epoch), encode_owner(record)):
            storage.put(OWNER_KEY, encode_owner(record))
            return Claim(record, previous, reason)
        # Another launch was faster. It is judged like any other owner; being told to take over
        # does not reach a job that is starting at this moment, or two would chase each other.
        take_over = False


def renew(storage: Storage, record: OwnerRecord, *, state: State | None = None,
          clock: Clock | None = None) -> OwnerRecord:  # fmt: skip
    """Show that the claim lives; call it every `record.period_s`, with what it returned last.

    `state` "draining" says that the ranks are gone and only their saver still writes: another
    launch may then begin. Raises OwnedError when a later epoch has taken the path over.
    """
    clock = Clock() if clock is None else clock
    if _exists(storage, epoch_key(record.epoch + 1)):
        raise OwnedError(
            f"{storage.url}: epoch {record.epoch} is over, a later launch has taken the path; "
            f"this one must not write there any more"
        )
    renewed = record.renewed(int(clock.unix()), state)
    storage.put(OWNER_KEY, encode_owner(renewed))
    return renewed


def release(storage: Storage, epoch: int, *, clock: Clock | None = None) -> None:
    """Say that epoch `epoch` is over, so that the next launch need not wait; idempotent."""
    owner = read_owner(storage)
    if owner is not None and owner.epoch == epoch and owner.state != "released":
        now = int((Clock() if clock is None else clock).unix())
        storage.put(OWNER_KEY, encode_owner(owner.renewed(now, "released")))


def read_owner(storage: Storage) -> OwnerRecord | None:
    """The newest claim: the owner's record, or the epoch's own where that is newer."""
    newest = read_epochs(storage).newest
    owner = _read(storage, OWNER_KEY)
    if newest and (owner is None or owner.epoch < newest):
        return _read(storage, epoch_key(newest)) or owner
    return owner


def living_owner(storage: Storage, *, identity: Identity | None = None,
                 clock: Clock | None = None) -> OwnerRecord | None:  # fmt: skip
    """The owner if it is alive, else None; watches a remote one for two of its periods."""
    identity = this_process() if identity is None else identity
    decision, owner = _judge(storage, identity, Clock() if clock is None else clock, False)
    return owner if decision.verdict is Verdict.REFUSE else None


def record_restored_from(storage: Storage, epoch: int, directory: str | None) -> None:
    """Record, once, the checkpoint that `epoch` begins from; None when it begins with nothing.

    Saying the same again is harmless. Raises StorageError when another one is on record:
    a launch that goes back further must claim a new epoch.
    """
    if directory is not None and place_of(directory) is None:
        raise FormatError(f"{directory!r} is not the name of a checkpoint directory")
    data = stamp({"epoch": epoch, "restored_from": directory})
    key = restored_key(epoch)
    if not _create_exactly(storage, key, data):
        raise StorageError(
            f"{storage.url}/{key}: epoch {epoch} is already on record as restored from "
            f"{storage.get(key, MAX_RECORD_BYTES)!r}, and now from {directory!r}; claim a new epoch"
        )


def read_record(storage: Storage, key: str, what: str = "a record") -> dict[str, Any]:
    """The body of a stamped record below `epochs/`.

    Raises ObjectNotFoundError when it is not there, FormatError when it is damaged: not `what`.
    """
    source = f"{storage.url}/{key}"
    try:
        return check_stamp(json.loads(storage.get(key, MAX_RECORD_BYTES)), source)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source}: not {what}: {error}") from error


def read_restored(storage: Storage, epoch: int) -> Place | None:
    """Where `epoch` began; None for nothing. Raises ObjectNotFoundError when not on record."""
    key = restored_key(epoch)
    source, raw = f"{storage.url}/{key}", read_record(storage, key)
    if set(raw) != {"epoch", "restored_from"}:
        raise FormatError(f"{source}: not a record of where an epoch began")
    if raw["epoch"] != epoch:
        raise FormatError(f"{source}: belongs to epoch {raw['epoch']!r}")
    directory = raw["restored_from"]
    if directory is None:
        return None
    place = place_of(directory) if isinstance(directory, str) else None
    if place is None:
        raise FormatError(f"{source}: {directory!r} is not the name of a checkpoint directory")
    return place


def read_epochs(storage: Storage) -> Epochs:
    """The newest epoch that was claimed and those that recorded where they began."""
    found = [_EPOCH_KEY.fullmatch(info.key) for info in storage.list(EPOCHS)]
    known = [int(match[1]) for match in found if match]
    recorded = frozenset(int(match[1]) for match in found if match and match[2])
    return Epochs(max(known, default=0), recorded)


def _wait_for_turn(
    storage: Storage, identity: Identity, clock: Clock, take_over: bool
) -> tuple[OwnerRecord | None, str]:
    decision, owner = _judge(storage, identity, clock, take_over)
    if decision.verdict is Verdict.REFUSE:
        raise OwnedError(
            f"{storage.url} is owned by another job: {decision.reason}. Stop that job, give this "
            f'one another "path", or set "take_over": true if you know that it is dead'
        )
    return owner, decision.reason


def _judge(
    storage: Storage, identity: Identity, clock: Clock, take_over: bool
) -> tuple[Decision, OwnerRecord | None]:
    """Look at the owner until the decision is not to watch any longer."""
    first = read_owner(storage)
    began_s = clock.monotonic()
    latest = first
    while True:
        observed = None
        if first is not None and latest is not None:
            watched_s = clock.monotonic() - began_s
            observed = Observation(first, latest, watched_s, see_process(latest.identity, identity))
        decision = may_take_over(observed, now_unix_s=int(clock.unix()), take_over=take_over)
        if decision.verdict is not Verdict.WATCH:
            return decision, latest
        assert latest is not None
        clock.sleep(min(decision.wait_s, latest.period_s / 2))
        latest = read_owner(storage) or latest


def _create_exactly(storage: Storage, key: str, data: bytes) -> bool:
    """Whether `key` now holds `data`, by us or by an attempt of ours that seemed to fail."""
    is_new = storage.create(key, data)
    if is_new and storage.has_atomic_create:
        return True
    return storage.get(key, MAX_RECORD_BYTES) == data


def _exists(storage: Storage, key: str) -> bool:
    try:
        storage.size(key)
    except ObjectNotFoundError:
        return False
    return True


def _read(storage: Storage, key: str) -> OwnerRecord | None:
    """The record at `key`; None, with an event, when it is damaged: its twin may serve."""
    try:
        return decode_owner(storage.get(key, MAX_RECORD_BYTES), source=f"{storage.url}/{key}")
    except ObjectNotFoundError:
        return None
    except (FormatError, UnreadableError) as error:
        events.emit(events.Lost(f"owner record {key}", str(error)))
        return None
