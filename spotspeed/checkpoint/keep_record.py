"""What a launch has said about keeping, written down at the path for whoever tidies up after it.

    epochs/000007.keep.json      `keep`, and whether nodes have tiers of their own, of epoch 7

The command line removes old checkpoints by it when nobody is alive at the path. Readers of before
these records ignore them, as they do every name below epochs/ that they do not know.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from spotspeed.checkpoint.ownership import EPOCHS, read_record
from spotspeed.core.documents import stamp
from spotspeed.core.retention import Keep
from spotspeed.errors import FormatError
from spotspeed.storage.contract import Storage

VERSION = 1
_KEY = re.compile(rf"{EPOCHS}/(\d{{6,16}})\.keep\.json")
_WHAT = "a record of what a job keeps"


@dataclass(frozen=True, slots=True)
class KeepRecord:
    """The job's `keep`, and whether parts of its saves may lie on nodes' own disks."""

    keep: Keep
    has_tiers: bool


def record_keep(storage: Storage, epoch: int, record: KeepRecord) -> None:
    """Write `record` down for `epoch`, which the caller owns; durable on return."""
    body = {"version": VERSION, "epoch": epoch, "has_tiers": record.has_tiers,
            "keep": asdict(record.keep)}  # fmt: skip
    storage.put(f"{EPOCHS}/{epoch:06d}.keep.json", stamp(body))


def read_keep(storage: Storage) -> KeepRecord | None:
    """What the newest epoch that has said anything has said; None when none has.

    Raises FormatError when that record is damaged or of a later version.
    """
    found = [match for info in storage.list(EPOCHS) if (match := _KEY.fullmatch(info.key))]
    if not found:
        return None
    newest = max(found, key=lambda match: int(match[1]))
    raw = read_record(storage, newest[0], _WHAT)
    try:
        if raw["version"] != VERSION or raw["epoch"] != int(newest[1]):
            raise ValueError(f"version {raw['version']!r} of epoch {raw['epoch']!r}")
        if type(raw["has_tiers"]) is not bool:
            raise ValueError(f"has_tiers is {raw['has_tiers']!r}")
        return KeepRecord(Keep(**raw["keep"]), raw["has_tiers"])
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{storage.url}/{newest[0]}: not {_WHAT}: {error}") from error
