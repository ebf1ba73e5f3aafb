"""The save of those who have lost a rank: what replicas still hold, written as by so many ranks.

Its ticket counts the survivors alone, and each of them takes the seat that it has among them. So it
is a checkpoint like any other, and nothing in it waits for the dead.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from spotspeed.checkpoint.ownership import EPOCHS, read_record
from spotspeed.core.documents import stamp
from spotspeed.core.layout import Fragment
from spotspeed.core.manifest import Ticket
from spotspeed.errors import CaptureError, FormatError, StorageError
from spotspeed.state.piece import Piece
from spotspeed.storage.contract import Storage

Lost = tuple[int, ...]
NAMED_TENSORS = 3
"""So many of the tensors that are missing are named in an error."""


@dataclass(frozen=True, slots=True)
class Seats:
    """Who writes a save: all `world_size` ranks but those in `lost`, seen by `rank`."""

    rank: int
    world_size: int
    lost: Lost = ()

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(rank for rank in range(self.world_size) if rank not in self.lost)

    @property
    def seat(self) -> int:
        """This rank's number among the writers."""
        return self.members.index(self.rank)

    def divide(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces with the shares of the lost divided among the others.

        Raises CaptureError saying what only a lost rank held.
        """
        if not self.lost:
            return list(pieces)
        alone = [piece.fragment for piece in pieces if not self._is_everywhere(piece)]
        if alone:
            raise CaptureError(self._missing(alone))
        return [replace(piece, holding=replace(piece.holding, replica_index=self.seat,
                                               replica_count=len(self.members)))
                for piece in pieces]  # fmt: skip

    def _is_everywhere(self, piece: Piece) -> bool:
        return piece.holding.replica_count == self.world_size

    def _missing(self, alone: Sequence[Fragment]) -> str:
        """Only this rank's own parts are known here: those of the lost are of the same tensors."""
        keys = list(dict.fromkeys(f"{item.key.kind} of {item.key.name}" for item in alone))
        named = ", ".join(keys[:NAMED_TENSORS])
        more = f" and {len(keys) - NAMED_TENSORS} more" if len(keys) > NAMED_TENSORS else ""
        ranks = ", ".join(map(str, self.lost))
        return (
            f"rank {ranks} is lost, and its part of the state with it: {named}{more} are divided "
            f"among {self.world_size} ranks, and no living rank holds a copy of that part"
        )


class Writer(Protocol):
    """A rank of a launch that writes to `storage`."""

    storage: Storage
    rank: int
    world_size: int


def take_seats(writer: Writer, ticket: Ticket, lost: Lost) -> Seats:
    """Who writes `ticket`; where ranks are lost, after claiming that these survivors do."""
    seats = Seats(writer.rank, writer.world_size, lost)
    if lost:
        claim_last_save(writer.storage, ticket, seats)
    return seats


def claim_last_save(storage: Storage, ticket: Ticket, seats: Seats) -> None:
    """Become the survivors of this launch that save its last step; the others may live as well.

    Ranks that a broken network parts give each other up, and only one of the groups may seal. The
    first to create the record does; after it only those of its own members that have lost yet
    another. Every member calls this. Raises StorageError when another group was first.
    """
    body = {"attempt": ticket.attempt, "epoch": ticket.epoch, "lost": list(seats.lost)}
    for number in itertools.count(1):
        key = last_save_key(ticket.epoch, number)
        if storage.create(key, stamp(body)) and storage.has_atomic_create:
            return
        theirs = _lost_of(storage, key)
        if theirs == set(seats.lost):
            return
        if not theirs < set(seats.lost):
            raise StorageError(
                f"{storage.url}/{key}: ranks that have given up rank {seats.rank} save the last "
                f"step by themselves; lost to them are {sorted(theirs)}, here {list(seats.lost)}"
            )


def last_save_key(epoch: int, number: int) -> str:
    return f"{EPOCHS}/{epoch:06d}.survivors-{number}.json"


def _lost_of(storage: Storage, key: str) -> set[int]:
    what = "a record of survivors"
    raw = read_record(storage, key, what)
    try:
        return {int(rank) for rank in raw["lost"]}
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{storage.url}/{key}: not {what}: {error!r}") from error
