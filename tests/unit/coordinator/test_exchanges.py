"""Exchanges of values between all ranks, with both control threads."""

from __future__ import annotations

import pytest

from spotspeed.errors import CoordinationError
from spotspeed.testing import network as networks
from tests.unit.coordinator.test_coordinator import job_of


@pytest.fixture(params=["python", "native"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test here runs with the control thread in Python and with the native one."""
    monkeypatch.setattr(networks, "kind", request.param)
    return str(request.param)


def test_an_exchange_gives_every_rank_all_values_in_order() -> None:
    with job_of(4) as job:
        for turn in range(20):
            found = job.each(
                lambda rank, turn=turn: job.coordinators[rank].exchange(
                    f"turn {turn}", b"%d.%d" % (turn, rank)
                )
            )
            assert found == [[b"%d.%d" % (turn, rank) for rank in range(4)]] * 4


def test_an_exchange_of_values_larger_than_a_message_arrives_whole() -> None:
    with job_of(3) as job:
        values = [bytes([rank]) * 1_500_000 for rank in range(3)]
        assert job.each(lambda r: job.coordinators[r].exchange("x", values[r])) == [values] * 3
        with pytest.raises(CoordinationError, match="at most"):
            job.coordinators[0].exchange("x", bytes(3_000_000))


def test_ranks_at_different_places_of_the_program_are_named() -> None:
    with job_of(3) as job:
        labels = ["restore", "restore", "save"]

        def exchange(rank: int) -> str:
            with pytest.raises(CoordinationError) as caught:
                job.coordinators[rank].exchange(labels[rank], b"")
            return str(caught.value)

        for text in job.each(exchange):
            assert "exchange 'restore'; ranks [2] exchange 'save'" in text


def test_a_rank_that_does_not_come_to_an_exchange_is_named_by_all_others() -> None:
    with job_of(3) as job:

        def exchange(rank: int) -> str:
            if rank == 1:
                return "ranks [1]"
            with pytest.raises(CoordinationError) as caught:
                job.coordinators[rank].exchange("x", b"", 1.0)
            return str(caught.value)

        assert all("ranks [1]" in text for text in job.each(exchange))


@pytest.mark.parametrize("late", [0, 1])
def test_what_some_ranks_have_given_up_is_passed_over_by_those_that_come_later(late: int) -> None:
    with job_of(2) as job:
        early = job.coordinators[1 - late]
        for turn in range(6):
            with pytest.raises(CoordinationError, match=rf"missing: (ranks \[{late}\]|the answer)"):
                early.exchange(f"alone {turn}", b"", 0.05)
        for turn in range(3):
            whole = job.each(
                lambda rank, turn=turn: job.coordinators[rank].exchange(f"{turn}", b"%d" % rank)
            )
            assert whole == [[b"0", b"1"]] * 2
