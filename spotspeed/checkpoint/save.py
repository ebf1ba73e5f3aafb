"""One save of this rank: the live state as fragments and blobs, handed to the stager."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spotspeed.checkpoint.named import NamedSave
from spotspeed.checkpoint.survivors import Seats
from spotspeed.core import plain
from spotspeed.core.deadline import Orders
from spotspeed.core.layout import KIND_BLOB, KIND_MASTER, KIND_WEIGHT, TensorKey
from spotspeed.core.manifest import Ticket
from spotspeed.staging.stager import Stager, Terms
from spotspeed.state.moment import behind
from spotspeed.state.piece import Piece
from spotspeed.state.plain_tensors import to_plain
from spotspeed.state.provider import StateProvider
from spotspeed.state.small import Record, SmallState

if TYPE_CHECKING:
    import torch

    from spotspeed.staging.check import Window
    from spotspeed.staging.staged import StagedSave

JOB_KEY = TensorKey(KIND_BLOB, "job")
"""What all ranks share and rank 0 writes: counters, param groups, scheduler, client state."""


def rank_key(rank: int) -> TensorKey:
    """What belongs to one rank alone: its random number generators."""
    return TensorKey(KIND_BLOB, "rank", f"rank-{rank}")


@dataclass(frozen=True, slots=True)
class Seen:
    """The tensors of one save as they are at the step, and what tells whether they change."""

    named: NamedSave
    provider: StateProvider
    pieces: Sequence[Piece]
    window: Window


def see(
    ticket: Ticket, named: NamedSave, live: StateProvider, small: SmallState, stager: Stager
) -> Seen:
    """Describe the tensors of a save; from here on a change of them may be noticed.

    Raises CaptureError for state that is not known.
    """
    provider, after = named.provider(live), small.snapshot(ticket.step).ready
    with behind(after):
        pieces = provider.pieces()
        return Seen(named, provider, pieces, _watch(ticket, pieces, stager, after))


def begin_save(
    ticket: Ticket,
    *,
    seats: Seats,
    sources: tuple[Seen, SmallState, Stager],
    orders: Orders | None = None,
) -> StagedSave:
    """Start to stage this rank's part of `ticket`; returns before the bytes are copied.

    `seats` says who the ticket's ranks are; `orders` replaces how the config would have it stored.
    The tensors may not change until the save is staged. Raises CaptureError when something cannot
    be stored, naming it: also what only a lost rank had.
    """
    record = sources[1].snapshot(ticket.step)
    with behind(record.ready):
        return _begin_save(ticket, record, seats, sources, orders)


def _begin_save(
    ticket: Ticket, record: Record, seats: Seats, sources: tuple[Seen, SmallState, Stager],
    orders: Orders | None,
) -> StagedSave:  # fmt: skip
    seen, small, stager = sources
    provider, rank = seen.provider, seats.seat
    underived = provider.derived_mismatches()
    seen.window.join(_watch(ticket, underived, stager, record.ready))
    shared = seats.divide([*seen.pieces, *underived])
    pieces = [*shared, *small.buffer_pieces(record, seat=rank)]
    written_by = {"world_size": ticket.world_size}
    own = {**small.rank(record), **written_by, **small.late.stored(ticket.step)}
    blobs = {rank_key(rank): _encode(own, what="rank state")}
    if rank == 0:
        job = {**small.job(record), **written_by, "model": provider.describe(),
               **seen.named.client_state.job()}  # fmt: skip
        blobs[JOB_KEY] = _encode(job, what="job state")
    held = [(share.fragment, share.tensor) for share in (piece.share for piece in pieces)
            if share.fragment.interval.count]  # fmt: skip
    frozen = [item for item in held if _is_frozen(item[0].key)]
    shares = [item for item in held if not _is_frozen(item[0].key)]
    shares += seen.named.client_state.tensors if rank == 0 else ()
    terms = Terms(rank, orders, seen.window, record.ready)
    return stager.stage(ticket, shares, blobs, frozen=frozen, terms=terms)


def _watch(ticket: Ticket, pieces: Sequence[Piece], stager: Stager, after: Any) -> Window:
    shares = (piece.share for piece in pieces)
    return stager.watch(ticket, [(share.fragment, share.tensor) for share in shares], after)


def _is_frozen(key: TensorKey) -> bool:
    """Whether it is a weight that no optimizer updates: the others are scoped, or masters."""
    return key.kind == KIND_WEIGHT and not key.scope


def share_of(
    provider: StateProvider, small: SmallState, step: int
) -> tuple[int, torch.device | None]:
    """About how many bytes this rank writes per save, without the small blobs, and from where.

    The state is that of `step`; the device is the accelerator that holds it, None for the host.
    Before the first step most optimizers have no state yet: two moments per master are assumed.
    """
    record = small.snapshot(step)
    pieces = provider.pieces()
    shares = [piece.share.fragment for piece in pieces]
    master_bytes = sum(share.size_bytes for share in shares if share.key.kind == KIND_MASTER)
    other_bytes = sum(share.size_bytes for share in shares if share.key.kind != KIND_MASTER)
    has_moments = any(share.key.kind not in (KIND_MASTER, KIND_WEIGHT) for share in shares)
    buffer_bytes = sum(piece.fragment.size_bytes for piece in small.buffer_pieces(record))
    moments_bytes = 0 if has_moments else 2 * master_bytes
    devices = (piece.tensor.device for piece in pieces)
    device = next((found for found in devices if found.type != "cpu"), None)
    return master_bytes + moments_bytes + other_bytes + buffer_bytes, device


def _encode(value: Mapping[str, Any], *, what: str) -> bytes:
    return plain.encode(to_plain(value), what=what)
