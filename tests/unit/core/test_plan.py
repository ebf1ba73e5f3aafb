"""How a notice's save is stored, by what earlier saves have taken."""

from __future__ import annotations

import pytest

from spotspeed.core.deadline import (
    Action,
    Limits,
    Measured,
    Orders,
    Pace,
    Places,
    choose,
    patience_s,
)

GB = 10**9
STATE = Measured(state_bytes=20 * GB, stage_bytes_s=10 * GB, agreement_s=0.0)
SLOW = Pace(1 * GB)
DISK = Pace(2 * GB)
SQUEEZED = Pace(1 * GB, encode_bytes_s=4 * GB, ratio=0.5)
HARD = Pace(4 * GB, encode_bytes_s=1 * GB, ratio=0.9)


@pytest.mark.parametrize(("left_s", "action", "orders", "done_s"), [
    # Through the disk the 20 GB are written in 10 s and drained in 20 s more.
    (120.0, Action.SAVE, Orders(), 31.0),
    (28.0, Action.SAVE, Orders(is_direct=True), 21.0),
    # 21 s of 22 s is too close to pass the disk by.
    (22.0, Action.SAVE_NODE, Orders(), 10.0),
    (12.0, Action.SAVE_NODE, Orders(), 10.0),
    (9.0, Action.STAGE, Orders(), 10.0),
    (1.0, Action.NOTHING, Orders(), float("inf")),
])  # fmt: skip
def test_the_time_left_decides_between_both_places_the_store_and_the_node(
    left_s: float, action: Action, orders: Orders, done_s: float
) -> None:
    places = Places("s3", SLOW, 1.0, near=DISK)
    decision, chosen = choose(Limits(cloud_s=left_s), STATE, places)
    assert (decision.action, chosen) == (action, orders)
    assert decision.done_s == pytest.approx(done_s)


@pytest.mark.parametrize(("pace", "chosen"), [
    (SQUEEZED, ""),  # 10 s to write what took 5 s to compress, or 20 s
    (HARD, "none"),  # 20 s to compress what takes 5 s to write as it is
    (SLOW, ""),  # nothing is known of compressed chunks
])  # fmt: skip
def test_a_save_is_compressed_when_that_is_the_faster_way(pace: Pace, chosen: str) -> None:
    _, orders = choose(Limits(cloud_s=60.0), STATE, Places("s3", pace, 1.0))
    assert orders == Orders(chosen)


@pytest.mark.parametrize(("left_s", "chosen"), [(25.0, ""), (9.0, "none")])
def test_what_stays_on_the_node_is_compressed_as_always_unless_it_does_not_fit_so(
    left_s: float, chosen: str
) -> None:
    places = Places("s3", Pace(GB // 10), 1.0, near=HARD)
    decision, orders = choose(Limits(cloud_s=left_s), STATE, places)
    assert (decision.action, orders) == (Action.SAVE_NODE, Orders(chosen))


def test_the_config_has_the_last_word_on_compression() -> None:
    _, orders = choose(Limits(cloud_s=60.0), STATE, Places("s3", HARD, 1.0, compression="zstd"))
    assert orders == Orders("zstd")


def test_with_no_way_that_fits_the_fastest_is_tried() -> None:
    decision, orders = choose(Limits(cloud_s=4.0), STATE, Places("s3", HARD, 1.0))
    assert (decision.action, orders) == (Action.STAGE, Orders("none"))
    assert "gone at 4.0 s" in decision.reason


def test_a_save_waits_for_the_step_no_longer_than_it_can_spare() -> None:
    def patience(left_s: float, launcher_s: float | None = None) -> float:
        limits = Limits(cloud_s=left_s, launcher_s=launcher_s)
        decision, _ = choose(limits, STATE, Places("s3", SLOW, 1.0))
        return patience_s(decision, limits, at_most_s=3.0)

    assert patience(60.0) == 3.0
    assert patience(22.5) == pytest.approx(1.5)
    assert patience(60.0, launcher_s=2.5) == pytest.approx(0.5)
    assert patience(15.0) == 0.0


@pytest.mark.parametrize("cost", [(0, 1, 1.0, 1.0), (1, 0, 1.0, 1.0), (1, 1, 1.0, 0.0)])
def test_a_save_of_nothing_tells_no_pace(cost: tuple[int, int, float, float]) -> None:
    assert Pace.of(*cost) is None


def test_a_pace_counts_stored_bytes_to_write_and_raw_bytes_to_encode() -> None:
    assert Pace.of(100, 50, 2.0, 5.0) == Pace(10.0, 50.0, 0.5)
    assert Pace.of(100, 50, 0.0, 5.0) == Pace(10.0, None, 0.5)
