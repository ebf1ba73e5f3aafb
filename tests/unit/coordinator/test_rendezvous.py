"""Ranks that did not meet at first meet later: no attempt stands in the next one's way."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from spotspeed.coordinator.address import Endpoint
from spotspeed.coordinator.rendezvous import Introduction, StoreRendezvous
from spotspeed.errors import CoordinationError

SIZE = 3


def meet(store: HashStore, rank: int, port: int, timeout_s: float) -> Introduction:
    own = Endpoint(rank, "here", ("127.0.0.1",), port)
    return StoreRendezvous(store).meet(own, world_size=SIZE, timeout_s=timeout_s)


def all_meet(store: HashStore, port: int) -> list[Introduction]:
    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(lambda rank: meet(store, rank, port + rank, 30.0), range(SIZE)))


@pytest.mark.parametrize(("early", "missing"), [
    ([0], r"ranks \[1, 2\]"), ([2], r"ranks \[0, 1\]"), ([1, 2], r"ranks \[0"), ([0, 1], r"2\]"),
])  # fmt: skip
def test_ranks_that_came_alone_are_told_who_did_not_and_meet_the_next_time(
    early: list[int], missing: str
) -> None:
    store = HashStore()
    for _ in range(2):
        with ThreadPoolExecutor(SIZE) as pool:
            calls = [pool.submit(meet, store, rank, 1000 + rank, 0.05) for rank in early]
            for call in calls:
                with pytest.raises(CoordinationError, match=missing):
                    call.result()
    for port in (2000, 3000):
        met = all_meet(store, port)
        assert len({each.secret for each in met}) == 1
        for each in met:
            ports = {rank: endpoint.port for rank, endpoint in each.endpoints.items()}
            assert ports == {rank: port + rank for rank in range(SIZE)}, "no stale one"
