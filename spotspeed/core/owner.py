"""Who owns a path, and when another launch may take it over: values in, a decision out.

A launch is known to be dead when it ran under the same boot and process namespace as we do and its
process is gone or is another one. Of any other launch only the renewal counter tells: still for
two of its periods, it is dead; moving, it lives. No clock of another machine is trusted.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any, Literal

from spotspeed.core.documents import check_stamp, stamp
from spotspeed.errors import FormatError

State = Literal["training", "draining", "released"]
STATES: tuple[State, ...] = ("training", "draining", "released")
MAX_RECORD_BYTES = 64 * 1024
MAX_PERIOD_S = 600.0
WATCHED_PERIODS = 2.0


@dataclass(frozen=True, slots=True)
class Identity:
    """One process, told apart from every other that ran or will run.

    `start_ticks` is field 22 of /proc/PID/stat (clock ticks since boot); `namespace` names the
    process namespace in which `pid` is meant (proc(5)).
    """

    host: str
    boot_id: str
    namespace: str
    pid: int
    start_ticks: int

    def is_visible_to(self, other: Identity) -> bool:
        """Whether `other` can tell by process id whether this one lives."""
        return (self.boot_id, self.namespace) == (other.boot_id, other.namespace)


@dataclass(frozen=True, slots=True)
class OwnerRecord:
    """An epoch's claim to its path, renewed by counting up.

    `state` is "training" while ranks run, "draining" when only the saver still writes for them,
    "released" after a close. `nonce` tells two claims of one process apart. The two times are the
    owner's own clock (Unix seconds); they serve messages, and where hours are meant, `is_over`.
    """

    epoch: int
    identity: Identity
    nonce: str
    state: State
    counter: int
    period_s: float
    claimed_unix_s: int
    renewed_unix_s: int

    def renewed(self, now_unix_s: int, state: State | None = None) -> OwnerRecord:
        """The next record of the same claim."""
        return replace(
            self,
            counter=self.counter + 1,
            state=self.state if state is None else state,
            renewed_unix_s=now_unix_s,
        )


class Process(Enum):
    """What can be seen of the owner's process from here."""

    ALIVE = "alive"
    GONE = "gone"
    OURS = "ours"
    UNKNOWN = "unknown"


class Verdict(Enum):
    """What a claimant is to do."""

    TAKE_OVER = "take over"
    WATCH = "watch"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict and its reason; with WATCH, look again after `wait_s` at the latest."""

    verdict: Verdict
    reason: str
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Observation:
    """What a claimant has seen: the record at first, the record now, and the time between."""

    first: OwnerRecord
    latest: OwnerRecord
    watched_s: float
    process: Process


def may_take_over(observed: Observation | None, *, now_unix_s: int, take_over: bool) -> Decision:
    """Whether the path may be claimed now; `observed` is None when nobody has claimed it yet."""
    if observed is None:
        return Decision(Verdict.TAKE_OVER, "nobody has owned it yet")
    owner = observed.latest
    who = describe(owner, now_unix_s)
    if owner.state != "training":
        return Decision(Verdict.TAKE_OVER, f"{who} has {_PAST[owner.state]}")
    if observed.process is Process.GONE:
        return Decision(Verdict.TAKE_OVER, f"{who} is gone")
    if observed.process is Process.OURS:
        return Decision(Verdict.TAKE_OVER, f"{who} is this very process")
    if take_over:
        return Decision(Verdict.TAKE_OVER, f"told to take over from {who}")
    if observed.process is Process.ALIVE:
        return Decision(Verdict.REFUSE, f"{who} is running on this machine")
    if (owner.epoch, owner.nonce, owner.counter) != (
        observed.first.epoch, observed.first.nonce, observed.first.counter,
    ):  # fmt: skip
        return Decision(Verdict.REFUSE, f"{who} is alive: it renewed its claim while we watched")
    left_s = WATCHED_PERIODS * owner.period_s - observed.watched_s
    if left_s > 0:
        return Decision(Verdict.WATCH, f"{who} may be alive", left_s)
    return Decision(
        Verdict.TAKE_OVER, f"{who} has not renewed its claim for {observed.watched_s:.1f} s"
    )


def is_over(owner: OwnerRecord | None, *, now_unix_s: int, silence_s: float) -> bool:
    """Whether nobody writes for a launch any more that is not alive; not its savers either.

    Those of other nodes are not seen from here, so one that was not closed must have been silent.
    """
    if owner is None or owner.state == "released":
        return True
    return now_unix_s - owner.renewed_unix_s >= silence_s


def describe(owner: OwnerRecord, now_unix_s: int) -> str:
    """The owner in words; its age is by its own clock and may be off."""
    age_s = max(0, now_unix_s - owner.claimed_unix_s)
    return (
        f"epoch {owner.epoch} (host {owner.identity.host}, pid {owner.identity.pid}, "
        f"claimed {age_s} s ago)"
    )


def encode_owner(record: OwnerRecord) -> bytes:
    """The stored form of a record."""
    return stamp(asdict(record))


def decode_owner(data: bytes, *, source: str) -> OwnerRecord:
    """Parse a stored record; raises FormatError naming `source`."""
    try:
        raw = check_stamp(json.loads(data.decode("ascii")), source)
        identity = _fields(raw.pop("identity"), Identity)
        record = OwnerRecord(identity=Identity(**identity), **_fields(raw, OwnerRecord, "identity"))
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise FormatError(f"{source}: not an owner record: {error}") from error
    if record.state not in STATES or record.epoch < 1 or record.counter < 0:
        raise FormatError(f"{source}: not an owner record: epoch {record.epoch}, {record.state!r}")
    if not 0 < record.period_s <= MAX_PERIOD_S:
        raise FormatError(f"{source}: a renewal period of {record.period_s} s")
    return record


_PAST = {"draining": "stopped training; its saver is finishing", "released": "closed"}
_KINDS: dict[str, type | tuple[type, ...]] = {
    "str": str, "int": int, "float": (int, float), "State": str,
}  # fmt: skip


def _fields(raw: Any, kind: Any, *left_out: str) -> dict[str, Any]:
    wanted = {n: a for n, a in kind.__annotations__.items() if n not in left_out}
    if not isinstance(raw, dict) or set(raw) != set(wanted):
        raise ValueError(f"{kind.__name__} needs exactly {sorted(wanted)}")
    for name, annotation in wanted.items():
        if not isinstance(raw[name], _KINDS[annotation]) or isinstance(raw[name], bool):
            raise ValueError(f"{name} is {raw[name]!r}")
    return raw
