"""What becomes of a notice's save: planned, tried again, given up in time."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import spotspeed
from spotspeed.checkpoint.tiers import open_node, survey
from tests.object_stores import ObjectStore, serve
from tests.ranks import ROOT, Finished, run_ranks
from tests.slow_wire import SlowWire

pytestmark = pytest.mark.ranks
DRIVER = ROOT / "tests" / "distributed" / "drivers" / "notices.py"
LIMIT_S = 240
STATE_BYTES = 256 * 256 * 12
"""About what both ranks save together: masters and two moments."""


def run(folder: Path, case: str, **block: Any) -> Finished:
    return run_ranks(2, DRIVER, case, str(folder), json.dumps(block), timeout_s=LIMIT_S,
                     check=False)  # fmt: skip


def happened(folder: Path, kind: str, rank: int = 0) -> list[dict[str, Any]]:
    """The events of a kind, in order, that a rank has seen."""
    lines = map(json.loads, (folder / f"events-{rank}").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


@contextlib.contextmanager
def frozen_after_the_save(
    folder: Path, wire: SlowWire | None, notice: Path, *, text: str
) -> Iterator[list[float]]:
    """Once both ranks have made a save durable: freeze the wire, then write the notice's file.

    Yields a list that gets the moment of the notice.
    """
    told_at: list[float] = []
    is_over = threading.Event()

    def tell() -> None:
        saved = [folder / f"saved-{rank}" for rank in (0, 1)]
        while not all(path.exists() for path in saved):
            if is_over.wait(0.05):
                return
        if wire is not None:
            wire.freeze()
        told_at.append(time.monotonic())
        notice.write_text(text)

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        yield told_at
    finally:
        is_over.set()
        thread.join()
        notice.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with serve("s3", tmp_path_factory.mktemp("s3") / "server") as store:
        yield store


@pytest.fixture
def wire(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowWire]:
    """Between every client and the S3 server."""
    port = urlsplit(server.environment["AWS_ENDPOINT_URL"]).port
    assert port is not None
    with SlowWire(port) as wire:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{wire.port}")
        yield wire


def test_a_killed_saver_is_replaced_and_the_notice_s_save_made_again_with_a_plan(
    tmp_path: Path,
) -> None:
    finished = run(tmp_path, "saver_dies")
    assert finished.returncode == 75, finished.output[-6000:]
    newest, good = spotspeed.list_checkpoints(str(tmp_path / "checkpoints"))
    assert newest.reason == "notice" and good.tag == "good"
    assert f"durable at step {newest.step}; leaving with 75" in finished.output
    assert any("saver process" in lost["what"] for lost in happened(tmp_path, "Lost"))
    # What a notice can save is said at the start and with the first save, whose numbers plans have.
    said = [(told["notice_s"], told["is_estimate"]) for told in happened(tmp_path, "Forecast")]
    measured = [(120.0, False), (30.0, False), (15.0, False)]
    assert said in (measured, [(120.0, True), (30.0, True), (15.0, True), *measured])
    assert happened(tmp_path, "Forecast", rank=1) == []
    for rank in (0, 1):
        (plan,) = happened(tmp_path, "Planned", rank)
        assert plan["action"] == "save" and plan["step"] == newest.step
        assert 0 < plan["staged_s"] <= plan["done_s"] < plan["left_s"] <= 120


@pytest.mark.full
def test_a_notice_during_restore_leaves_with_what_was_there_and_loses_nothing(
    tmp_path: Path,
) -> None:
    assert run(tmp_path, "plain").returncode == 0
    path = str(tmp_path / "checkpoints")
    before = [info.directory for info in spotspeed.list_checkpoints(path)]
    finished = run(tmp_path, "restoring")
    assert finished.returncode == 75, finished.output[-6000:]
    assert finished.output.count("interrupted, durable at step 4; leaving with 75") == 2
    assert [info.directory for info in spotspeed.list_checkpoints(path)] == before
    assert run(tmp_path, "plain").returncode == 0
    assert json.loads((tmp_path / "restored-0").read_text()) == 4


@pytest.mark.full
def test_a_store_that_never_answers_ends_the_job_in_time_with_76_and_the_last_good_tag(
    server: ObjectStore, wire: SlowWire, tmp_path: Path
) -> None:
    """The file is the notice: the test can freeze the store before it appears."""
    url, notice = f"{server.url}/hung", tmp_path / "notice"
    with frozen_after_the_save(tmp_path, wire, notice, text="8") as told_at:
        finished = run(tmp_path, "told", path=url, notice={"file": str(notice)})
        ended_at = time.monotonic()
    assert finished.returncode == 76, finished.output[-6000:]
    assert "nothing newer than 'good' (step 3; the store does not answer)" in finished.output
    # 8 s of notice, 2 s for the last words, and what mpirun takes on a busy machine.
    assert ended_at - told_at[0] < 60


@pytest.mark.full
def test_with_too_little_time_for_the_store_the_node_s_disk_keeps_it_for_the_next_launch(
    server: ObjectStore, wire: SlowWire, tmp_path: Path
) -> None:
    url, notice, local = f"{server.url}/slow", tmp_path / "notice", tmp_path / "nvme"
    wire.bytes_per_s = STATE_BYTES / 6
    block = {"path": url, "local_path": str(local), "notice": {"file": str(notice)}}
    with frozen_after_the_save(tmp_path, None, notice, text="3"):
        finished = run(tmp_path, "told", **block)
    assert finished.returncode == 76, finished.output[-6000:]
    assert "durable on its node only" in finished.output
    for rank in (0, 1):
        (plan,) = happened(tmp_path, "Planned", rank)
        assert plan["action"] == "save on the node" and not plan["is_direct"], plan
        assert [unsafe["notice_s"] for unsafe in happened(tmp_path, "Unsafe", rank)][-1] <= 3
    assert happened(tmp_path, "Forecast")[0]["action"] == "save", "120 s are enough"
    step = plan["step"]
    assert any(found.parts for found in survey(open_node(str(local), url)))
    wire.bytes_per_s = None
    assert run(tmp_path, "plain", **block).returncode == 0
    assert json.loads((tmp_path / "restored-0").read_text()) == step
