"""What a rank plans for a notice before, and apart from, any measurement."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from spotspeed import events, planning
from spotspeed.agent.metering import Meter
from spotspeed.config import parse_block
from spotspeed.core.deadline import Orders, Pace
from spotspeed.core.manifest import Receipt, ShardRecord, Ticket
from spotspeed.interruption import LAUNCHER, Interruption
from spotspeed.planning import Planner, launcher_grace_s, pod_grace_s
from spotspeed.storage import open_storage

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


def test_at_the_start_a_small_trial_tells_what_notices_can_save_and_leaves_nothing(
    tmp_path: Path, seen: list[events.Event]
) -> None:
    done = threading.Event()
    events.add_sink(lambda event: done.set() if isinstance(event, events.Unsafe) else None)
    storage = open_storage(str(tmp_path))
    for rank in (1, 0):  # Only rank 0 tells.
        Planner(parse_block({"path": str(tmp_path)}), rank).estimate(storage, 10**15)
    assert done.wait(20)
    told = [(e.notice_s, e.is_estimate) for e in seen if isinstance(e, events.Forecast)]
    assert told == [(120.0, True), (30.0, True), (15.0, True)]
    (unsafe,) = [event for event in seen if isinstance(event, events.Unsafe)]
    assert (unsafe.notice_s, unsafe.state_bytes) == (120.0, 10**15)
    assert 0 < unsafe.largest_bytes < 10**15
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_store_that_cannot_be_tried_is_no_reason_to_complain(
    tmp_path: Path, seen: list[events.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "TRIAL_ROOM_BYTES", 2**62)
    Planner(parse_block({"path": str(tmp_path)}), 0).estimate(open_storage(str(tmp_path)), 10**6)
    for thread in threading.enumerate():
        if thread.name == "spotspeed-estimate":
            thread.join(20)
    assert seen == [] and list(tmp_path.rglob("*")) == []


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


def test_a_launcher_s_sigterm_ends_the_round_before_the_launcher_kills(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[str, float]] = []
    coordinator = SimpleNamespace(notice=lambda source, left_s: told.append((source, left_s)))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv("SPOTSPEED_SUPERVISED", raising=False)
    cuts = Interruption(None, parse_block({"path": "/unused"}), 0)
    cuts._session = SimpleNamespace(coordinator=coordinator)
    for source, left_s in (("SIGTERM", 120.0), ("SIGTERM", 8.0), ("SIGUSR1", 120.0)):
        cuts.on_notice(source, left_s)
    cuts.on_notice(*told[0])
    assert told == [(LAUNCHER, 28.0), (LAUNCHER, 8.0)]


def test_a_stated_grace_of_the_pod_bounds_what_a_signal_leaves(seen: list[events.Event]) -> None:
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "SPOTSPEED_POD_GRACE_S": "45"}
    assert pod_grace_s(pod) == 45.0
    assert pod_grace_s({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None
    planner = Planner(parse_block({"path": "/unused"}), 0, pod_s=pod_grace_s(pod))
    # 50 s to write, measured: more than the pod has, less than the cloud.
    planner._stage_bytes_s, planner._state_bytes = 1e9, 50
    planner._remote.append(Pace(1.0))
    for source in ("SIGTERM", "ec2"):
        planner.plan(7, source, 120.0, "the start")
    plans = [event.action for event in seen if isinstance(event, events.Planned)]
    assert plans == ["stage", "save"]


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
