"""The staging pool: its slots, its size."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotspeed.errors import PoolExhaustedError, StorageError
from spotspeed.staging.pool import (
    MIN_SLOTS,
    SlotPool,
    available_memory_bytes,
    choose_arena_bytes,
    choose_slot_bytes,
)

MIB = 1 << 20


def test_a_slot_is_held_by_one_at_a_time() -> None:
    pool = SlotPool(3)
    taken = [pool.acquire() for _ in range(3)]
    assert sorted(slot for slot in taken if slot is not None) == [0, 1, 2]
    assert pool.acquire(timeout_s=0) is None
    pool.release([1])
    assert pool.acquire() == 1


@pytest.mark.parametrize("slots", [[0], [-1], [2], [1, 1]])
def test_a_slot_that_is_not_out_cannot_be_returned(slots: list[int]) -> None:
    pool = SlotPool(2)
    pool.acquire()
    pool.acquire()
    pool.release([0])
    with pytest.raises(ValueError, match="is not in use"):
        pool.release(slots)


def test_a_waiting_thread_gets_the_slot_that_is_released() -> None:
    pool = SlotPool(1)
    slot = pool.acquire()
    assert slot == 0
    got: list[int | None] = []
    waiter = threading.Thread(target=lambda: got.append(pool.acquire(timeout_s=30)))
    waiter.start()
    pool.release([slot])
    waiter.join(30)
    assert got == [0]


def test_a_waiting_thread_learns_that_it_need_not_wait() -> None:
    pool, stop = SlotPool(1), threading.Event()
    pool.acquire()
    got: list[int | None] = []
    waiter = threading.Thread(target=lambda: got.append(pool.acquire(give_up=stop.is_set)))
    waiter.start()
    stop.set()
    pool.wake()
    waiter.join(30)
    assert got == [None]


def test_a_waiting_thread_learns_that_the_saver_died() -> None:
    pool = SlotPool(1)
    pool.acquire()
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            pool.acquire()
        except StorageError as error:
            caught.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    pool.fail(StorageError("gone"))
    waiter.join(30)
    assert [str(error) for error in caught] == ["gone"]
    with pytest.raises(StorageError, match="gone"):
        pool.acquire(timeout_s=0)


@given(
    share_bytes=st.integers(0, 1 << 38),
    available_bytes=st.integers(0, 1 << 40),
    host_memory_bytes=st.none() | st.integers(1, 1 << 40),
    local_world_size=st.integers(1, 16),
)
def test_the_arena_stays_within_the_ranks_part_of_memory(
    share_bytes: int, available_bytes: int, host_memory_bytes: int | None, local_world_size: int
) -> None:
    slot_bytes = choose_slot_bytes(share_bytes)
    try:
        size, _ = choose_arena_bytes(
            share_bytes, host_memory_bytes=host_memory_bytes, available_bytes=available_bytes,
            local_world_size=local_world_size,
        )  # fmt: skip
    except PoolExhaustedError:
        allowed = min(available_bytes, host_memory_bytes or available_bytes // 2)
        assert allowed // local_world_size < MIN_SLOTS * slot_bytes
        return
    assert size % slot_bytes == 0
    assert size >= MIN_SLOTS * slot_bytes
    assert size * local_world_size <= available_bytes
    assert host_memory_bytes is None or size * local_world_size <= host_memory_bytes


def test_the_whole_share_fits_where_there_is_memory() -> None:
    size, reason = choose_arena_bytes(
        1000 * MIB, host_memory_bytes=None, available_bytes=100_000 * MIB, local_world_size=8
    )
    assert 1000 * MIB < size < 1100 * MIB
    assert reason == "a whole save of this rank fits"


@pytest.mark.parametrize(
    ("host_memory_bytes", "reason"),
    [
        (None, f"half of the {1000 * MIB} bytes that the node has free, divided among 2 ranks"),
        (900 * MIB, "staging.host_memory_gb, divided among 2 ranks"),
        (2000 * MIB, f"the {1000 * MIB} bytes that the node has free, divided among 2 ranks"),
    ],
)
def test_a_pool_smaller_than_a_save_says_what_limits_it(
    host_memory_bytes: int | None, reason: str
) -> None:
    chosen = choose_arena_bytes(
        1000 * MIB, host_memory_bytes=host_memory_bytes, available_bytes=1000 * MIB,
        local_world_size=2,
    )  # fmt: skip
    assert chosen[1] == f"{reason} of the node"


def test_too_little_memory_is_an_error_that_says_what_to_set() -> None:
    with pytest.raises(PoolExhaustedError, match=r"staging\.host_memory_gb to 0\.134"):
        choose_arena_bytes(
            4096 * MIB, host_memory_bytes=MIB, available_bytes=1 << 40, local_world_size=8
        )


def test_this_machine_has_memory() -> None:
    assert available_memory_bytes() > MIB
