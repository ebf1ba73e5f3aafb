"""Restore that all ranks agree on: one chooses, every rank verifies what it reads and votes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from spotspeed import events
from spotspeed.checkpoint.agreement import Exchange, Verdict, all_or_none, raise_first, share, vote
from spotspeed.checkpoint.catalog import CheckpointInfo, find, scan_mended
from spotspeed.checkpoint.fill import fill
from spotspeed.checkpoint.named import CLIENT_STATE, decode_client_state
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.save import JOB_KEY, rank_key
from spotspeed.checkpoint.sharing import Shared, fill_shared
from spotspeed.core import plain
from spotspeed.core.frozen import ObjectRecord
from spotspeed.core.layout import KIND_BLOB, KIND_BUFFER, KIND_CLIENT, StoredTensor, TensorKey
from spotspeed.errors import (
    CorruptionError,
    FormatError,
    InvalidLayoutError,
    SpotSpeedError,
    UnsupportedLayoutError,
)
from spotspeed.state.fit import ALL, Wanted
from spotspeed.state.piece import Piece
from spotspeed.state.plain_tensors import from_plain
from spotspeed.state.provider import StateProvider
from spotspeed.state.small import PARTS, SmallState
from spotspeed.storage.contract import Storage

_logger = logging.getLogger("spotspeed")
_FALLS_BACK = (CorruptionError, UnsupportedLayoutError)
"""Objections to one checkpoint that an older one may not meet."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What was restored: the checkpoint's identity, and what the caller had stored with it."""

    tag: str
    step: int
    directory: str
    digest: str
    world_size: int
    """Number of ranks that wrote it."""
    client_state: dict[str, Any] = field(repr=False, default_factory=dict)
    cursor: Any = field(repr=False, default=None)
    """Position in the data, as it was recorded at the step's boundary."""
    objects: tuple[ObjectRecord, ...] = field(repr=False, default=())
    """The frozen objects that it refers to, whose weights are those of the model now."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Who takes part: this rank's place, how it talks to the others, what it fills."""

    rank: int
    world_size: int
    exchange: Exchange
    provider: StateProvider
    small: SmallState
    wanted: Wanted = ALL
    parts: Collection[str] = PARTS
    """What of the small state is restored."""
    on_change: Callable[[], None] = lambda: None
    """Called before the first byte of the live state is replaced, on this rank."""
    near: Storage | None = None
    """This node's own tier, which is read where it verifies."""

    @property
    def is_whole(self) -> bool:
        """Whether what is restored is the stored state, and not a part of it."""
        return self.wanted == ALL and set(self.parts) == PARTS


@dataclass(frozen=True, slots=True)
class _Read:
    """One candidate, wholly read and verified by this rank."""

    job: dict[str, Any]
    rank_state: dict[str, Any]
    size_bytes: int
    near_bytes: int
    objects: tuple[ObjectRecord, ...]
    late: Mapping[str, Any]
    """The stored rank state whose late state this rank takes over."""


def restore_agreed(
    storage: Storage, seat: Seat, *, tag: str | None = None, digest: str | None = None
) -> Restored | None:
    """Fill the live state from the newest checkpoint that verifies on every rank.

    With `tag`, that checkpoint alone will do, and with `digest` (of its manifest) none that has
    taken its place. Returns None when there is none, on all ranks alike.
    The same on every rank, or an error on every rank: CorruptionError when checkpoints exist and
    none verifies, ObjectNotFoundError for an unknown tag, ReshardError when the model differs.
    The live state is as it was unless `seat.on_change` has been called on some rank.
    """
    began, rejected = time.monotonic(), []
    candidates = _Candidates(storage, tag, digest)
    while True:
        offer = share(seat.exchange, "restore-offer", seat.rank, candidates.offer)
        if offer["directory"] is None:
            # Nobody may begin anew beside checkpoints that are there but cannot be read.
            rejected += offer["damaged"]
            break
        objections, read = _try(storage, seat, offer)
        if not objections and read is not None:
            return _finish(seat, offer, read, began)
        raise_first([o for o in objections if not issubclass(o.kind, _FALLS_BACK)])
        why = "; ".join(f"rank {o.rank}: {o.text}" for o in objections)
        rejected.append(f"{offer['directory']}: {why}")
        events.emit(events.FellBack(offer["directory"], why))
        if tag is not None:
            break
    if rejected:
        raise CorruptionError(
            "no checkpoint could be restored; run `spotspeed verify` on the path to see the "
            "damage. Tried, newest first:\n  " + "\n  ".join(rejected)
        )
    return None


class _Candidates:
    """Rank 0's list of what to try, newest first."""

    def __init__(self, storage: Storage, tag: str | None, digest: str | None) -> None:
        self._storage, self._tag, self._digest = storage, tag, digest
        self._remaining: Iterator[CheckpointInfo] | None = None
        self._damaged: list[str] = []

    def offer(self) -> dict[str, Any]:
        """The next candidate as plain data; its directory is None when there is none left."""
        if self._remaining is None:
            self._remaining = iter(self._list())
        info = next(self._remaining, None)
        if info is None:
            return {"directory": None, "damaged": self._damaged}
        return {"directory": info.directory, "digest": info.digest, "tag": info.tag,
                "step": info.step, "world_size": info.world_size,
                "is_named": self._tag is not None}  # fmt: skip

    def _list(self) -> Sequence[CheckpointInfo]:
        if self._tag is not None:
            found = find(self._storage, self._tag)
            if self._digest not in (None, found.digest):
                raise CorruptionError(
                    f"{self._storage.url}/{found.directory}: its manifest has the digest "
                    f"{found.digest}, expected {self._digest}: this is another checkpoint than "
                    f"the one that was saved; load another tag"
                )
            return [found]
        catalog = scan_mended(self._storage)
        for damaged in (*catalog.lost, *catalog.damaged):
            events.emit(events.FellBack(damaged.directory, damaged.cause))
            self._damaged.append(f"{damaged.directory}: {damaged.cause}")
        return catalog.sealed


def _try(storage: Storage, seat: Seat, offer: dict[str, Any]) -> tuple[list[Verdict], _Read | None]:
    """Read the offered checkpoint; the ranks that object to it, and what this rank has read."""
    opened, read, objection = None, None, None
    try:
        opened = _open(storage, seat, offer)
    except SpotSpeedError as error:
        objection = error
    reader, pieces = (opened.reader, opened.pieces) if opened else (None, [])
    shared = Shared(rest=pieces, is_whole=opened is not None)
    if seat.world_size > 1:
        shared = fill_shared(pieces, reader, seat.exchange, seat.rank)
        objection = objection or shared.error
    try:
        if opened is not None and shared.is_whole:
            read = _read(seat, offer, opened, shared)
    except SpotSpeedError as error:
        objection = error
    return vote(seat.exchange, "restore-vote", objection), read


@dataclass(frozen=True, slots=True)
class _Opened:
    """One candidate, of which nothing but its small parts has been read, and what it is to fill."""

    reader: CheckpointReader
    job: dict[str, Any]
    rank_state: dict[str, Any]
    pieces: list[Piece]


def read_job(reader: CheckpointReader, directory: str) -> dict[str, Any]:
    """What all ranks share beside the tensors; the caller's own state is under CLIENT_STATE."""
    stored = plain.decode(reader.blob(JOB_KEY), source=f"{directory}: job")
    if not isinstance(stored, dict):
        raise FormatError(f"{directory}: the job's state is no dict")
    client_state = decode_client_state(stored.pop(CLIENT_STATE, None), reader)
    return {**from_plain(stored), CLIENT_STATE: client_state}


def _open(storage: Storage, seat: Seat, offer: dict[str, Any]) -> _Opened:
    reader = CheckpointReader.open(
        storage, offer["directory"], digest=offer["digest"], near=seat.near
    )
    stored = reader.tensors()
    job = read_job(reader, offer["directory"])
    old_rank = seat.provider.source_rank(job.get("model", {}), int(offer["world_size"]))
    rank_state = from_plain(
        plain.decode(reader.blob(rank_key(old_rank)), source=f"{offer['directory']}: rank")
    )
    return _Opened(reader, job, rank_state, _targets(seat, stored, old_rank))


def _read(seat: Seat, offer: dict[str, Any], opened: _Opened, shared: Shared) -> _Read:
    """Read what this rank has not got together with its neighbours."""
    reader = opened.reader
    bytes_read = shared.bytes_read + fill(shared.rest, reader)
    seat.provider.check_restore()
    return _Read(opened.job, opened.rank_state, bytes_read, _near_bytes(reader), reader.objects(),
                 _late(reader, seat, offer, opened.rank_state))  # fmt: skip


def _targets(seat: Seat, stored: Mapping[TensorKey, StoredTensor], old_rank: int) -> list[Piece]:
    """What this rank has to fill; from here on the live state is not what it was."""
    if not seat.wanted.weights:
        seat.on_change()
        return seat.provider.prepare_restore({}, replace(seat.wanted, is_strict=False))
    others = (KIND_BLOB, KIND_BUFFER, KIND_CLIENT)
    tensors = {key: value for key, value in stored.items() if key.kind not in others}
    try:
        pieces = seat.provider.prepare_restore(tensors, seat.wanted)
    except InvalidLayoutError:
        raise  # The only error that comes before any change.
    except SpotSpeedError:
        seat.on_change()
        raise
    seat.on_change()
    return pieces + seat.small.buffer_targets(_buffers_of(stored, old_rank))


def _late(
    reader: CheckpointReader, seat: Seat, offer: dict[str, Any], own: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The rank state whose late state is taken over: this rank's own, or rank 0's on all ranks.

    Raises FormatError where it is absent and another checkpoint would do.
    """
    if int(offer["world_size"]) != seat.world_size or own.get("rank") != seat.rank:
        source = f"{offer['directory']}: rank 0"
        own = from_plain(plain.decode(reader.blob(rank_key(0)), source=source))
    if seat.is_whole and not offer["is_named"]:
        seat.small.late.check(own)
    return own


def _near_bytes(reader: CheckpointReader) -> int:
    """Bytes that came from this node's tier; says so when some of it had to be left."""
    near, directory = reader.near, reader.manifest.ticket.directory
    if near is None:
        return 0
    if near.refused:
        cause = f"{near.refused} chunks do not verify on this node's disk and were read from `path`"
        events.emit(events.Bypassed(directory, cause))
    return near.bytes_read


def _buffers_of(
    stored: Mapping[TensorKey, StoredTensor], rank: int
) -> dict[TensorKey, StoredTensor]:
    """The buffers that an old rank stored."""
    scope = f"rank-{rank}"
    return {key: value for key, value in stored.items()
            if key.kind == KIND_BUFFER and key.scope == scope}  # fmt: skip


def _load_late(seat: Seat, stored: Mapping[str, Any]) -> list[str]:
    """Give late state back on every rank; the first refusal on every rank."""
    is_own = (stored.get("rank"), stored.get("world_size")) == (seat.rank, seat.world_size)
    notes = all_or_none(
        seat.exchange, "late-state", lambda: seat.small.late.load(stored, is_own=is_own)
    )
    if seat.small.late:
        seat.small.record()
        seat.small.end_step()
    return notes


def _finish(seat: Seat, offer: dict[str, Any], read: _Read, began: float) -> Restored:
    seat.provider.finish_restore()
    notes = seat.small.apply(
        read.job, read.rank_state, written_by=offer["world_size"], parts=seat.parts
    )
    if seat.is_whole:
        notes += _load_late(seat, read.late)
    for note in notes:
        _logger.warning("%s: %s", offer["directory"], note)
    elapsed_s = time.monotonic() - began
    events.emit(events.Resumed(offer["directory"], offer["step"], offer["world_size"],
                               seat.world_size, read.size_bytes, elapsed_s,
                               read.near_bytes))  # fmt: skip
    return Restored(offer["tag"], offer["step"], offer["directory"], offer["digest"],
                    offer["world_size"], read.job[CLIENT_STATE],
                    read.job.get("cursor"), read.objects)  # fmt: skip
