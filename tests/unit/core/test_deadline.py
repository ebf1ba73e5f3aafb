"""What fits into the time that a notice leaves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotspeed.core.deadline import (
    Action,
    Limits,
    Measured,
    Sink,
    decide,
    largest_state_bytes,
)

GB = 10**9
REMOTE = Sink("s3", write_bytes_s=1 * GB, seal_s=0.5, survives_machine=True)
PACKED = Sink("s3, zstd", 1 * GB, 0.5, True, ratio=0.5, encode_bytes_s=1.5 * GB)
DISK = Sink("nvme", write_bytes_s=3 * GB, seal_s=0.1, survives_machine=False)
MEASURED = Measured(state_bytes=20 * GB, stage_bytes_s=4 * GB, agreement_s=0.5, step_s=1.5)


def test_the_ranks_end_with_whoever_comes_first_and_the_machine_with_cloud_or_pod() -> None:
    limits = Limits(cloud_s=120.0, launcher_s=30.0, pod_s=60.0)
    assert (limits.ranks_s, limits.machine_s) == (30.0, 60.0)
    assert math.isinf(Limits().ranks_s)


@pytest.mark.parametrize(("limits", "action", "sink", "done_s"), [
    (Limits(cloud_s=120.0), Action.SAVE, PACKED, 2.0 + 20 / 1.5 + 0.5),
    (Limits(cloud_s=15.0), Action.SAVE_NODE, DISK, 2.0 + 20 / 3 + 0.1),
    (Limits(cloud_s=8.0), Action.STAGE, None, 2.0 + 20 / 3 + 0.1),
    (Limits(cloud_s=6.0), Action.NOTHING, None, math.inf),
    (Limits(cloud_s=120.0, launcher_s=0.5), Action.NOTHING, None, math.inf),
    (Limits(cloud_s=120.0, launcher_s=8.0), Action.SAVE, PACKED, 2.0 + 20 / 1.5 + 0.5),
])  # fmt: skip
def test_the_best_that_fits_is_chosen(
    limits: Limits, action: Action, sink: Sink | None, done_s: float
) -> None:
    decision = decide(limits, MEASURED, [REMOTE, DISK, PACKED])
    assert (decision.action, decision.sink) == (action, sink)
    assert decision.done_s == pytest.approx(done_s)
    assert (decision.spare_s >= 0) is (decision.sink is not None)


def test_the_reason_has_the_numbers() -> None:
    decision = decide(Limits(cloud_s=6.0), MEASURED, [REMOTE])
    assert "7.0 s" in decision.reason and "6.0 s" in decision.reason


@given(
    limits=st.builds(Limits, cloud_s=st.floats(0.1, 300), launcher_s=st.floats(0.1, 300)),
    begin_s=st.floats(0, 10), stage=st.floats(1e6, 1e11),
    sink=st.builds(Sink, st.just("store"), st.floats(1e6, 1e11), st.just(0.5), st.just(True),
                   ratio=st.floats(0.1, 1), encode_bytes_s=st.none() | st.floats(1e6, 1e11)),
)  # fmt: skip
def test_the_largest_state_fits_and_a_larger_one_does_not(
    limits: Limits, begin_s: float, stage: float, sink: Sink
) -> None:
    size = largest_state_bytes(limits, Measured(0, stage, 0.0, begin_s), sink)

    def action(state_bytes: int) -> Action:
        return decide(limits, Measured(state_bytes, stage, 0.0, begin_s), [sink]).action

    if size > 1000:
        assert action(int(size * 0.999)) is Action.SAVE
    assert action(int(size * 1.001) + 1000) is not Action.SAVE
