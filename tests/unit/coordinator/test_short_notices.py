"""Notices that leave no time, or come too early: what is tried, and how a rank ends."""

from __future__ import annotations

import json

import pytest

from spotspeed import interruption
from spotspeed.checkpoint.session import _find_sources
from spotspeed.config import NoticeConfig, parse_block
from spotspeed.coordinator.coordinator import GateVerdict
from spotspeed.errors import ConfigError
from spotspeed.interruption import Interruption
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
