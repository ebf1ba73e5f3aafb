"""What a rank plans for a notice before, and apart from, any measurement."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from spotspeed import events
from spotspeed.agent.metering import Meter
from spotspeed.config import parse_block
from spotspeed.core.deadline import Orders
from spotspeed.core.manifest import Receipt, ShardRecord, Ticket
from spotspeed.planning import Planner, launcher_grace_s

TICKET = Ticket(1, 7, "c1", "step-7", "notice", 1, 0)


@pytest.fixture
def seen() -> Iterator[list[events.Event]]:
    found: list[events.Event] = []
    events.add_sink(found.append)
    yield found
    events.remove_sink(found.append)


@pytest.mark.parametrize(("left_s", "patience_s"), [(120.0, 3.0), (8.0, 2.0), (0.0, 0.0)])
def test_without_a_measured_save_the_config_decides_and_little_is_waited_for(
    left_s: float, patience_s: float, seen: list[events.Event]
) -> None:
    config = parse_block({"path": "/shared/run", "compression": "zstd"})
    plan = Planner(config, 3).plan(7, "SIGTERM", left_s, "'step-5' (step 5)")
    assert (plan.orders, plan.patience_s) == (Orders("zstd"), patience_s)
    (planned,) = seen
    assert isinstance(planned, events.Planned)
    assert (planned.rank, planned.step, planned.left_s) == (3, 7, left_s)
    assert "no save has been measured" in planned.reason


@pytest.mark.parametrize(("environ", "grace_s"), [
    ({"TORCHELASTIC_RUN_ID": "none"}, 30.0),
    ({"CROSS_RANK": "0"}, 30.0),
    ({"OMPI_COMM_WORLD_RANK": "0"}, None),
    ({"TORCHELASTIC_RUN_ID": "none", "SPOTSPEED_SUPERVISED": "/tmp/mark"}, None),
    ({}, None),
])  # fmt: skip
def test_what_a_launcher_leaves_its_ranks_counts_unless_a_supervisor_is_above_it(
    environ: dict[str, str], grace_s: float | None
) -> None:
    assert launcher_grace_s(environ) == grace_s


@pytest.mark.parametrize("is_side_by_side", [False, True])
def test_a_meter_counts_writing_alone_or_from_the_first_byte_to_the_last(
    is_side_by_side: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def take(seconds: float) -> float:
        now[0] += seconds
        return seconds

    meter = Meter(2, is_side_by_side=is_side_by_side)
    assert meter.encoding(take, 3.0) == 3.0
    meter.writing(take, 1.0)
    meter.encoding(take, 5.0)
    meter.writing(take, 0.5)
    shard = ShardRecord("s", 60, 40, 8, "0" * 64, 100)
    cost = meter.cost(4, Receipt(TICKET, 0, shard), is_near=True)
    assert (cost.save, cost.is_near, cost.raw_bytes, cost.stored_bytes) == (4, True, 100, 60)
    assert cost.encode_s == 4.0, "two encoders side by side"
    assert cost.write_s == (6.5 if is_side_by_side else 1.5)
