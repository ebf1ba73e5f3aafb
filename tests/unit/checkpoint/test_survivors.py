"""Who may save what is left of a job that has lost ranks, and what of it there is."""

from __future__ import annotations

import pytest
import torch

from spotspeed.checkpoint.survivors import Seats, claim_last_save, last_save_key, take_seats
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, Holding, TensorKey
from spotspeed.core.manifest import Ticket
from spotspeed.errors import CaptureError, FormatError, StorageError
from spotspeed.state.piece import Piece
from spotspeed.storage.memory import MemoryStorage

EPOCH, COUNT = 3, 10


def ticket(attempt: str = "c0002t1r0") -> Ticket:
    return Ticket(EPOCH, 5, attempt, "step-5", "notice", 2, 0)


def piece(index: int, count: int, start: int = 0, stop: int = COUNT) -> Piece:
    fragment = Fragment(TensorKey("fp32", "w"), "float32", (COUNT,), Interval(start, stop))
    return Piece(Holding(fragment, index, count), torch.arange(float(start), float(stop)))


def test_the_survivors_write_each_element_of_a_replica_once() -> None:
    shares = []
    for rank in (0, 2, 3):
        (divided,) = Seats(rank, 4, lost=(1,)).divide([piece(rank, 4)])
        shares.append(divided.share.fragment.interval)
    assert [share.start for share in shares] == [0, *(share.stop for share in shares[:-1])]
    assert shares[-1].stop == COUNT


def test_without_a_loss_nothing_is_divided_anew() -> None:
    seats, only = Seats(2, 4), piece(0, 1, 5, 7)
    (same,) = seats.divide([only])
    assert same is only and seats.seat == 2


def test_a_part_that_only_the_lost_had_is_named() -> None:
    with pytest.raises(CaptureError, match=r"rank 1 is lost.*fp32 of w are divided among 2 ranks"):
        Seats(0, 2, lost=(1,)).divide([piece(0, 2), piece(0, 1, 0, 5)])


def test_all_members_of_one_group_may_save_and_no_other_group() -> None:
    storage = MemoryStorage()
    for rank in (0, 2, 3):
        claim_last_save(storage, ticket(), Seats(rank, 4, lost=(1,)))
    with pytest.raises(StorageError, match=r"have given up rank 1 .*lost to them are \[1\]"):
        claim_last_save(storage, ticket("c0002t1r1"), Seats(1, 4, lost=(0, 2, 3)))


def test_a_group_that_loses_another_member_may_save_again_but_not_who_it_lost() -> None:
    storage = MemoryStorage()
    claim_last_save(storage, ticket(), Seats(0, 4, lost=(1,)))
    claim_last_save(storage, ticket("c0003t2r0"), Seats(0, 4, lost=(1, 3)))
    claim_last_save(storage, ticket("c0003t2r0"), Seats(2, 4, lost=(1, 3)))
    with pytest.raises(StorageError, match="have given up rank 3"):
        claim_last_save(storage, ticket("c0003t2r3"), Seats(3, 4, lost=(0, 1, 2)))


def test_a_damaged_claim_is_named() -> None:
    storage = MemoryStorage()
    storage.put(last_save_key(EPOCH, 1), b'{"lost": 7}')
    with pytest.raises(FormatError, match=r"000003\.survivors-1\.json: not a record"):
        claim_last_save(storage, ticket(), Seats(0, 2, lost=(1,)))


def test_nothing_is_claimed_while_all_live() -> None:
    class Writer:
        storage, rank, world_size = MemoryStorage(), 1, 2

    assert take_seats(Writer(), ticket(), ()).members == (0, 1)
    assert not list(Writer.storage.list(""))
