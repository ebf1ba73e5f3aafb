"""Host copies: gathered and scattered bytes arrive, and nothing is read or written beyond them."""

from __future__ import annotations

import gc
import os
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotspeed.staging.native import (
    Arena,
    CopyCancelledError,
    CopyEngine,
    MemoryRange,
    buffer_range,
    copy_gather,
    copy_scatter,
    submit_gather,
    submit_scatter,
)

SIZES = st.lists(
    st.one_of(st.integers(0, 300), st.integers(60_000, 70_000), st.integers(0, 1_500_000)),
    max_size=12,
)


@pytest.fixture(scope="module")
def engine() -> CopyEngine:
    return CopyEngine(3)


def random_array(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def parts_of(source: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    stops = np.cumsum(sizes, dtype=np.int64)
    return [source[stop - size : stop] for size, stop in zip(sizes, stops, strict=True)]


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, skew=st.integers(0, 33), seed=st.integers(0, 2**32 - 1))
def test_gather_then_scatter_returns_every_byte(
    engine: CopyEngine, sizes: list[int], skew: int, seed: int
) -> None:
    total = sum(sizes)
    # Sources in reverse order of address, so that the gather really reorders.
    sources = parts_of(random_array(total, seed), sizes)[::-1]
    staged = np.full(total + skew + 5, 0xEE, dtype=np.uint8)
    target = staged[skew:]
    ranges = [buffer_range(source) for source in sources]
    assert copy_gather(engine, ranges, target) == total
    joined = np.concatenate([*sources, np.full(5, 0xEE, np.uint8)])
    assert np.array_equal(target, joined)
    assert (staged[:skew] == 0xEE).all()
    restored = [np.zeros_like(source) for source in sources]
    targets = [buffer_range(part, writable=True) for part in restored]
    assert copy_scatter(engine, target, targets) == total
    assert all(np.array_equal(a, b) for a, b in zip(sources, restored, strict=True))


def test_a_submitted_gather_ends_by_itself_at_low_priority() -> None:
    engine = CopyEngine(1, low_priority=True)
    source = random_array(3_000_000, 1)
    target = bytearray(source.nbytes)
    handle = submit_gather(engine, [buffer_range(source)], target, keep=source)
    assert handle.wait_for(60.0)
    assert handle.done()
    assert not handle.cancelled()
    assert handle.copied_bytes == handle.size_bytes == source.nbytes
    assert bytes(target) == source.tobytes()


def test_a_submitted_scatter_copies_the_other_way(engine: CopyEngine) -> None:
    source = os.urandom(1000)
    first, second = bytearray(400), bytearray(600)
    targets = [buffer_range(first, writable=True), buffer_range(second, writable=True)]
    assert submit_scatter(engine, source, targets, keep=(first, second)).wait() == 1000
    assert bytes(first + second) == source


def test_a_handle_keeps_the_memory_alive(engine: CopyEngine) -> None:
    class Owner:
        pass

    owner, source = Owner(), random_array(1000, 1)
    observer = weakref.ref(owner)
    handle = submit_gather(engine, [buffer_range(source)], bytearray(1000), keep=owner)
    del owner
    gc.collect()
    assert observer() is not None
    handle.wait()
    del handle
    gc.collect()
    assert observer() is None


def test_a_dropped_handle_writes_nothing_afterwards() -> None:
    engine = CopyEngine(1)
    source, target = np.ones(64_000_000, np.uint8), np.zeros(64_000_000, np.uint8)
    handle = submit_gather(engine, [buffer_range(source)], target)
    del handle
    written = int(target.sum())
    assert int(target.sum()) == written


def test_a_cancelled_copy_does_not_pass_for_a_whole_one() -> None:
    engine = CopyEngine(1)
    source, target = np.ones(256_000_000, np.uint8), np.zeros(256_000_000, np.uint8)
    handle = submit_gather(engine, [buffer_range(source)], target)
    handle.cancel()
    assert handle.done()
    assert int(target.sum()) == handle.copied_bytes < handle.size_bytes
    assert handle.cancelled()
    with pytest.raises(CopyCancelledError, match="256000000"):
        handle.wait()


def test_an_empty_list_is_a_finished_copy(engine: CopyEngine) -> None:
    assert engine.copy([]) == 0
    assert submit_gather(engine, [], bytearray(4)).done()


@pytest.mark.parametrize(
    "copies",
    [[(0, 4096, 8)], [(4096, 0, 8)], [(2**64 - 8, 4096, 16)], [(4096, 4100, 8)],
     [(4096, 8192, 8), (16384, 8199, 8)]],
    ids=["null source", "null target", "wraps", "overlaps itself", "targets overlap"],
)  # fmt: skip
def test_a_bad_list_is_refused(engine: CopyEngine, copies: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError):
        engine.copy(copies)


@pytest.mark.parametrize("copies", [[(-1, 1, 1)], [(1, 1, -1)], [(2**64, 1, 1)], [(1, 2)], ["abc"]])
def test_what_is_no_address_is_refused(engine: CopyEngine, copies: list) -> None:
    with pytest.raises(TypeError):
        engine.copy(copies)


def test_a_gather_that_does_not_fit_is_refused(engine: CopyEngine) -> None:
    source = buffer_range(bytes(9))
    with pytest.raises(ValueError, match="not inside"):
        copy_gather(engine, [source], bytearray(8))
    with pytest.raises(ValueError, match="writable"):
        copy_gather(engine, [source], bytes(9))
    with pytest.raises(ValueError, match="contiguous"):
        buffer_range(np.zeros(8, np.uint8)[::2])


def test_a_range_narrows_to_what_it_holds() -> None:
    whole = MemoryRange(4096, 100)
    assert whole.narrow(10, 90) == MemoryRange(4106, 90)
    for offset, size in [(-1, 1), (0, 101), (101, 0), (50, -1)]:
        with pytest.raises(ValueError):
            whole.narrow(offset, size)
    with pytest.raises(ValueError):
        MemoryRange(0, 1)


def test_an_engine_of_no_threads_is_refused() -> None:
    for threads in (0, 257):
        with pytest.raises(ValueError, match="1 to 256"):
            CopyEngine(threads)


def test_a_forked_child_is_told_that_the_engine_is_not_its_own(engine: CopyEngine) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            engine.copy([(4096, 8192, 8)])
        except RuntimeError as error:
            status = 0 if "forked child" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_arena_is_copied_to_like_any_buffer(engine: CopyEngine) -> None:
    arena = Arena.create(1 << 20)
    source = os.urandom(1 << 20)
    assert copy_gather(engine, [buffer_range(source)], arena) == 1 << 20
    assert bytes(arena) == source
