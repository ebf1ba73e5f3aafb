"""Notices that leave no time, or come too early: what is tried, and how a rank ends."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from spotspeed import interruption
from spotspeed.checkpoint.session import Standing, _find_sources
from spotspeed.config import NoticeConfig, parse_block
from spotspeed.coordinator.coordinator import Cut, GateVerdict
from spotspeed.errors import ConfigError
from spotspeed.interruption import Interruption
from spotspeed.roll_call import RollCall
from tests.unit.coordinator.test_coordinator import WAIT_S, job_of


def test_a_notice_whose_time_has_passed_is_still_saved_as_well_as_it_goes() -> None:
    with job_of(2) as job:
        job.start()
        assert job.each(lambda rank: job.train(rank, until=3)) == [3] * 2
        job.coordinators[1].notice("azure", 0.0)
        for saver in job.savers:
            saver.wait(lambda saver=saver: bool(saver.captures))
        assert job.each(lambda rank: job.coordinators[rank].gate(4)) == [GateVerdict.LEAVE] * 2
        for saver in job.savers:
            ((cut, digest, _),) = saver.outcomes
            assert (cut.step, digest) == (3, "seal of c0001")
            assert 0 < saver.captures[0].seconds_left < WAIT_S


def test_a_rank_that_is_told_to_leave_before_it_is_attached_ends_with_76(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(interruption, "leave_now", codes.append)
    config = parse_block({"path": "/unused"})
    Interruption(None, config, 3).leave("all ranks leave")
    assert codes == [76]
    assert "rank 3: interrupted while it was being attached" in capfd.readouterr().err


def test_a_cut_that_comes_while_a_rank_is_attached_is_served_as_soon_as_it_is() -> None:
    told: list[tuple[int, str | None]] = []
    coordinator = SimpleNamespace(report_durable=lambda number, seal: told.append((number, seal)))
    cuts = Interruption(None, parse_block({"path": "/unused"}), 0)
    for number in (1, 2):
        cuts.on_capture(Cut(number, -1, True, f"c000{number}", 0, "SIGTERM", 60.0, ()))
    cuts.on_outcome(Cut(1, -1, False, "c0001", 0, "SIGTERM", 60.0, ()), None, "too late")
    cuts._roll_call = RollCall(None, 0, None)
    cuts._session = SimpleNamespace(
        coordinator=coordinator, standing=Standing(7, "seal of 7"), epoch=1,
        storage=SimpleNamespace(url="/unused"), stager=SimpleNamespace(share_bytes=0),
    )  # fmt: skip
    assert told == []
    cuts.announce(1, "zero12", 0)
    assert told == [(2, "seal of 7")]


def test_an_endpoint_that_only_one_rank_finds_unusable_is_an_error_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, places = NoticeConfig(), [["host", "1"], ["host", "1"]]
    said: list[bytes] = []

    def exchange(label: str, value: bytes) -> list[bytes]:
        said.append(value)
        return [said[0], value]

    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "https://not.http")
    with pytest.raises(ConfigError, match=r"rank 0: 'https://not\.http'"):
        _find_sources(config, exchange, 0, places)
    with pytest.raises(ConfigError, match=r"rank 0: 'https://not\.http'"):
        _find_sources(config, exchange, 1, places)
    assert [json.loads(value)["error"] for value in said] == ["ConfigError", ""]


def test_each_container_watches_for_its_own_file(tmp_path) -> None:
    config = NoticeConfig(file=str(tmp_path / "notice"), cloud="none")
    places = [["host", "1"], ["host", "1"], ["host", "2"], ["other", "1"]]
    found = [_find_sources(config, lambda _, value: [value], rank, places) for rank in range(4)]
    assert [len(sources) for sources in found] == [1, 0, 1, 1]
    for (source,) in filter(None, found):
        source.stop()
