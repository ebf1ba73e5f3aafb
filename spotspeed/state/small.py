"""The small, mutable part of the training state, as it was at the exit of an update.

Tensors that an update changes are constant until the next one; what is kept here is not: random
generators and buffers move in the next forward, and the data cursor, counters, schedule, loss scale
and hyper-parameters belong to the same instant. `record` keeps all of it in a double buffer on the
training's thread; whoever saves takes a record and describes it on a thread of his own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from spotspeed.core import plain
from spotspeed.core.layout import StoredTensor, TensorKey
from spotspeed.errors import CaptureError, FormatError
from spotspeed.state import counters, groups, loader_guard, powers, rng, scaler, schedule
from spotspeed.state.buffers import BufferCopy, Buffers
from spotspeed.state.cursor import Cursor, resume_cursor
from spotspeed.state.late import LateState
from spotspeed.state.mesh import is_divided
from spotspeed.state.piece import Piece
from spotspeed.state.plain_tensors import to_plain
from spotspeed.state.rng import RngState

PARTS = frozenset({"counters", "schedule", "groups", "scaler", "rng"})
"""What `SmallState.apply` can restore; buffers are restored by whoever fills their targets."""

_VERSION = 1
_KEPT = 2
_OF_GROUPS = ("groups", "schedule")
"""What has one entry for each param_group, and so belongs to a rank where ranks differ in them."""


@dataclass(frozen=True, slots=True)
class Record:
    """The small state at one boundary; immutable, valid for as long as it is held."""

    step: int
    counters: dict[str, int]
    schedule: dict[str, Any]
    groups: list[dict[str, Any]]
    scaler: dict[str, Any]
    rng: RngState
    cursor: dict[str, Any] | None
    is_between_epochs: bool
    buffers: BufferCopy
    ready: Any
    """The accelerator's event after the update and the copies; None where nothing is queued."""


@dataclass(slots=True)
class _Slot:
    record: Record
    is_taken: bool = False
    """Whether a reader may hold it: then its buffers' memory is never used again."""


class SmallState:
    """Keeps the last two boundaries of one engine, and puts one back into a fresh engine.

    `group_names` gives the parameters of each live param_group by name. `record` and `apply` belong
    to the training's thread; `snapshot`, `job`, `rank` and `buffer_pieces` to any.
    """

    def __init__(
        self,
        engine: Any,
        group_names: Callable[[], Sequence[Sequence[str]]],
        *,
        seed: int | None = None,
        late: LateState | None = None,
    ) -> None:
        """`seed` tells jobs apart where ranks must be reseeded; torch's initial seed by default.

        Raises CaptureError, naming the object, when something of it cannot be stored.
        """
        self.cursor: Cursor | None = None
        """Set once the order of the data is known; recorded at every boundary from then on.

        `apply` sets it to the stored one, which thus survives until the loader is there again.
        """
        self.epochs_done = 0
        """Through which epochs of its stream this process has gone, call by call."""
        self.jumps = 0
        """How often `apply` has set the place in the data: iterators from before are elsewhere."""
        self.late = LateState() if late is None else late
        self._engine, self._group_names = engine, group_names
        self._optimizer = groups.inner_optimizer(engine)
        self._seed = int(torch.initial_seed() if seed is None else seed)
        self._rank, self._world_size = int(engine.global_rank), int(engine.world_size)
        self._buffers = Buffers(engine.module)
        self._is_divided = is_divided(engine)
        self._lock = threading.Lock()
        self._slots: list[_Slot] = []
        self._is_asynchronous = not get_accelerator().is_synchronized_device()
        loader_guard.watch()
        self._check()

    def record(self, *, completes_step: bool = False) -> None:
        """Keep the state as it is now, under the engine's step count; call at an update's exit.

        `completes_step` says that it is one. Costs some tens of microseconds and one copy of the
        buffers; takes no memory after the second call unless a reader holds an older record.
        """
        if completes_step:
            loader_guard.complete_step()
        with self._lock:
            oldest = self._slots.pop(0) if len(self._slots) == _KEPT else None
        spare = None if oldest is None or oldest.is_taken else oldest.record.buffers
        record = self._capture(spare)
        with self._lock:
            self._slots.append(_Slot(record))
        self.late.updated(record.step)

    def end_step(self) -> None:
        """The last completed step has ended: keep its late state."""
        self.late.end(int(self._engine.global_steps))

    def snapshot(self, step: int) -> Record:
        """The record of the boundary at which `step` was completed; it stays valid while held.

        Raises CaptureError when it is not one of the last two.
        """
        with self._lock:
            slot = next((s for s in reversed(self._slots) if s.record.step == step), None)
            kept = [s.record.step for s in self._slots]
            if slot is not None:
                slot.is_taken = True
        if slot is None:
            raise CaptureError(f"the state at the boundary of step {step} is gone: kept {kept}")
        if slot.record.ready is not None:
            slot.record.ready.synchronize()
        return slot.record

    def job(self, record: Record) -> dict[str, Any]:
        """What all ranks share, as plain data but for tensors; rank 0 stores it."""
        return {
            "version": _VERSION,
            "step": record.step,
            "seed": self._seed,
            "world_size": self._world_size,
            "counters": record.counters,
            "global_batch": int(self._engine.train_batch_size()),
            "schedule": record.schedule,
            "groups": groups.describe(record.groups, self._group_names()),
            "scaler": scaler.describe(record.scaler),
            "cursor": record.cursor,
        }

    def rank(self, record: Record) -> dict[str, Any]:
        """What belongs to this rank alone, as plain data but for tensors."""
        state = {
            "version": _VERSION,
            "step": record.step,
            "rank": self._rank,
            "world_size": self._world_size,
            "rng": record.rng.to_dict(),
            "between_epochs": record.is_between_epochs,
        }
        if self._is_divided:  # Rank 0 has other parameters, and may have other groups.
            state["groups"] = groups.describe(record.groups, self._group_names())
            state["schedule"] = record.schedule
        return state

    def buffer_pieces(self, record: Record, *, seat: int | None = None) -> list[Piece]:
        """This rank's buffers; the tensors belong to the record and stay as they are.

        `seat` is the rank that they are stored as, where it is another.
        """
        return self._buffers.pieces(record.buffers, f"rank-{self._rank if seat is None else seat}")

    def buffer_targets(self, stored: Mapping[TensorKey, StoredTensor]) -> list[Piece]:
        """The live buffers that take over `stored`, to be filled before `apply`.

        `stored` are the buffers of this rank or, when there were fewer, of rank `rank % old`.
        Raises InvalidLayoutError when a persistent buffer is missing or of another shape.
        """
        return self._buffers.targets(stored)

    def apply(
        self,
        job: Mapping[str, Any],
        rank_state: Mapping[str, Any] | None,
        *,
        written_by: int,
        parts: Collection[str] = PARTS,
    ) -> list[str]:
        """Restore what `job` and `rank` stored; returns, in words, what was not restored and why.

        Hyper-parameters are matched by parameter names and written after the scheduler's state:
        most schedulers set a group's rate only at their next step. A rank whose own generators were
        stored (`rank_state["rank"]` is its rank) takes them over, whatever `written_by` ranks
        there were. Any other rank (there are more now than then, or `rank_state` is None) is
        reseeded from the job's seed, its rank and the step: never from another rank's generators,
        whose numbers that rank is using. Generators are restored last; the result is recorded as
        the boundary of its step.

        Raises InvalidLayoutError when the groups are of another model, FormatError when the data
        is not what `job` and `rank` made.
        """
        _check_fields(job, _JOB_FIELDS, "job state")
        if job["world_size"] != written_by:
            raise FormatError(
                f"the job state is of {job['world_size']} ranks, the checkpoint of {written_by}"
            )
        kept = rank_state or {}
        own = {part: kept.get(part, job[part]) for part in _OF_GROUPS}
        planned = groups.plan(own["groups"], self._group_names()) if "groups" in parts else []
        self._buffers.finish()
        notes: list[str] = []
        if "counters" in parts:
            counters.apply(self._engine, job["counters"])
            notes += self._compare_batch(job.get("global_batch"))
            stored = job.get("cursor")
            samples = int(self._engine.global_samples)
            self.cursor = None if stored is None else resume_cursor(stored, samples)
            self.jumps += 1
        if "schedule" in parts:
            notes += schedule.apply(self._engine, own["schedule"])
        if "groups" in parts:
            groups.apply(self._optimizer, planned)
            schedule.show_rates(self._engine, self._optimizer)
            powers.count_through(self._optimizer)
        if "scaler" in parts:
            notes += scaler.apply(self._engine, job["scaler"])
        if "rng" in parts:
            notes += self._apply_rng(job, rank_state)
        with self._lock:
            self._slots.clear()
        # Now, and not at the first forward: by then the next batch has been fetched.
        self.record()
        return notes

    def _compare_batch(self, then: Any) -> list[str]:
        """In words, that a step now takes another number of samples than `then`, if it does."""
        now = int(self._engine.train_batch_size())
        if then is None or then == now:
            return []
        return [f"a step took {then} samples and takes {now} now: with a number in "
                f'"train_batch_size" it is the same on any number of ranks']  # fmt: skip

    def _apply_rng(self, job: Mapping[str, Any], rank_state: Mapping[str, Any] | None) -> list[str]:
        spare = rng.seed_of(job["seed"], self._rank, job["step"])
        if rank_state is not None:
            _check_fields(rank_state, _RANK_FIELDS, "rank state")
            if rank_state["step"] != job["step"]:
                raise FormatError(
                    f"the job state is of step {job['step']}, rank {rank_state['rank']}'s of "
                    f"{rank_state['step']}"
                )
            if rank_state["rank"] == self._rank:
                loader_guard.hold(draws=bool(rank_state.get("between_epochs")))
                return rng.restore(rank_state["rng"], spare_seed=spare)
        loader_guard.hold(draws=False)
        rng.reseed(spare)
        return [f"rank {self._rank} has no random state of its own there: it was reseeded"]

    def _capture(self, spare: BufferCopy | None) -> Record:
        engine = self._engine
        copied = self._buffers.copy(spare)
        scaled = scaler.capture(engine)
        ready = None
        if self._is_asynchronous:
            ready = get_accelerator().Event()
            ready.record()
        return Record(
            step=int(engine.global_steps),
            counters=counters.capture(engine),
            schedule=schedule.capture(engine),
            groups=groups.capture(self._optimizer),
            scaler=scaled,
            rng=rng.capture(),
            cursor=self.cursor.at(int(engine.global_samples)) if self.cursor else None,
            is_between_epochs=loader_guard.is_between_epochs(),
            buffers=copied,
            ready=ready,
        )

    def _check(self) -> None:
        """Fail at attach, not at the first save: everything must have a stored form."""
        self._buffers.check()
        record = self._capture(None)
        plain.encode(to_plain(self.job(record)), what="job state")
        plain.encode(to_plain(self.rank(record)), what="rank state")


_JOB_FIELDS: dict[str, type] = {
    "version": int, "step": int, "seed": int, "world_size": int, "counters": dict,
    "schedule": dict, "groups": list, "scaler": dict,
}  # fmt: skip
_RANK_FIELDS: dict[str, type] = {
    "version": int, "step": int, "rank": int, "world_size": int, "rng": dict,
}  # fmt: skip


def _check_fields(state: Mapping[str, Any], fields: Mapping[str, type], what: str) -> None:
    wrong = [name for name, kind in fields.items() if type(state.get(name)) is not kind]
    if wrong:
        raise FormatError(f"the {what} lacks {', '.join(wrong)}, or has another type there")
    if state["version"] != _VERSION:
        raise FormatError(
            f"the {what} is of version {state['version']}, this spotspeed reads {_VERSION}"
        )
