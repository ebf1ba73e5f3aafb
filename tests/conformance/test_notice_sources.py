"""What every notice source does, against services that speak the clouds' wire formats."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from spotspeed.config import NoticeConfig, parse_block
from spotspeed.coordinator.notice import configured_sources
from spotspeed.coordinator.notice.azure import azure_source
from spotspeed.coordinator.notice.contract import Notice, NoticeSource
from spotspeed.coordinator.notice.detect import find_platform
from spotspeed.coordinator.notice.ec2 import ec2_source
from spotspeed.coordinator.notice.file import file_source
from spotspeed.coordinator.notice.gce import gce_source
from spotspeed.coordinator.notice.url import url_source
from spotspeed.errors import ConfigError
from spotspeed.testing.metadata import Answer, Cloud, MetadataService

PERIOD_S = 0.02


def source_for(service: MetadataService) -> NoticeSource:
    if service.cloud == "ec2":
        return ec2_source(service.environ, period_s=PERIOD_S)
    if service.cloud == "gce":
        return gce_source(service.environ)
    if service.cloud == "azure":
        return azure_source(service.environ, period_s=PERIOD_S)
    return url_source("url", f"http://{service.address}/doom", period_s=PERIOD_S)


class Watched:
    """A source that is running, and the notices that it has delivered."""

    def __init__(self, source: NoticeSource) -> None:
        self.source = source
        self.notices: queue.Queue[Notice] = queue.Queue()
        source.start(self.notices.put)

    def next(self) -> Notice:
        return self.notices.get(timeout=15)

    def is_quiet(self, for_s: float = 0.3) -> bool:
        try:
            self.notices.get(timeout=for_s)
        except queue.Empty:
            return True
        return False


@pytest.fixture
def watch() -> Iterator[Callable[[NoticeSource], Watched]]:
    with ExitStack() as stack:

        def start(source: NoticeSource) -> Watched:
            stack.callback(source.stop)
            return Watched(source)

        yield start


@pytest.fixture(params=["ec2", "gce", "azure", "url"])
def service(request: pytest.FixtureRequest) -> Iterator[MetadataService]:
    cloud: Cloud = request.param
    with MetadataService(cloud) as running:
        yield running


Start = Callable[[NoticeSource], Watched]


def wait_until(fact: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 15
    while not fact():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_a_notice_is_delivered_once_with_the_time_that_is_left(
    service: MetadataService, watch: Start
) -> None:
    watched = watch(source_for(service))
    wait_until(lambda: len(service.requests) >= 1)
    assert watched.is_quiet()
    service.announce(95.0)
    notice = watched.next()
    assert notice.stop
    assert notice.source == service.cloud
    assert notice.seconds_left is not None
    # GCE names no time; the others' clocks have whole seconds.
    expected = 30.0 if service.cloud == "gce" else 95.0
    assert abs(notice.seconds_left - expected) < 5.0
    assert watched.is_quiet()


def test_a_notice_that_was_there_before_the_start_is_delivered(
    service: MetadataService, watch: Start
) -> None:
    service.announce(60.0)
    assert watch(source_for(service)).next().stop


@pytest.mark.parametrize(
    "answer",
    [
        Answer(500, b"internal error"),
        Answer(503),
        Answer(200, b""),
        Answer(200, b"[" * 500_000, {"ETag": "1", "Metadata-Flavor": "Google"}),
        Answer(200, b'{"Events": [{"EventType": [], "Resources": {}}], "action": []}'),
        Answer(200, b"\xff\xfe\x00" * 100),
        Answer(200, b"x" * (2 << 20)),
        Answer(302, b"", {"Location": "http://127.0.0.1:1/elsewhere"}),
        Answer(401),
    ],
    ids=["500", "503", "empty", "deep", "odd types", "binary", "huge", "redirect", "401"],
)
def test_after_answers_that_make_no_sense_a_notice_is_still_heard(
    service: MetadataService, watch: Start, answer: Answer
) -> None:
    service.misbehave = answer
    watched = watch(source_for(service))
    wait_until(lambda: len(service.requests) >= 3)
    service.misbehave = None
    heard_before = watched.notices.qsize()
    service.announce(60.0)
    for _ in range(heard_before + 1):
        assert watched.next().stop
    # An empty answer is all that the URL probe asks for.
    assert heard_before == (service.cloud == "url" and answer == Answer(200))


def test_stop_ends_the_thread_even_during_a_long_poll(service: MetadataService) -> None:
    source = source_for(service)
    watched = Watched(source)
    wait_until(lambda: len(service.requests) >= 1)
    begin_s = time.monotonic()
    source.stop()
    source.stop()
    assert time.monotonic() - begin_s < 2.0
    assert not [t for t in threading.enumerate() if t.name == f"spotspeed-notice-{source.name}"]
    service.announce(60.0)
    assert watched.is_quiet(0.1)


@pytest.mark.parametrize("cloud", ["ec2", "gce", "azure", "url"])
def test_a_service_that_is_not_there_yet_is_tried_again(cloud: Cloud, watch: Start) -> None:
    with MetadataService(cloud) as gone:
        port = int(gone.address.rpartition(":")[2])
    watched = watch(source_for(gone))
    assert watched.is_quiet(0.2)
    with MetadataService(cloud, port=port) as late:
        late.announce(60.0)
        assert watched.next().stop


def test_a_server_that_never_ends_its_answer_does_not_hold_up_stop(watch: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = url_source("url", f"http://127.0.0.1:{server.getsockname()[1]}/x")
        watch(source)
        connection, _ = server.accept()
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        begin_s = time.monotonic()
        source.stop()
        assert time.monotonic() - begin_s < 1.0
        connection.close()


def test_a_trickling_answer_is_given_up_after_the_limit_for_the_whole(watch: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        watch(url_source("url", f"http://127.0.0.1:{server.getsockname()[1]}/x"))
        connection, _ = server.accept()
        begin_s = time.monotonic()
        with pytest.raises(ConnectionError), connection:
            while time.monotonic() - begin_s < 10:
                connection.sendall(b"H")
                time.sleep(0.1)
        assert time.monotonic() - begin_s < 5


def test_no_proxy_is_asked(
    service: MetadataService, watch: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    service.announce(60.0)
    assert watch(source_for(service)).next().stop


def test_ec2_takes_a_new_token_when_the_old_one_has_expired(watch: Start) -> None:
    with MetadataService("ec2") as service:
        watched = watch(source_for(service))
        wait_until(lambda: len(service.requests) >= 3)
        service.forget_tokens()
        service.announce(60.0)
        assert watched.next().stop
        assert service.requests.count("PUT /latest/api/token") == 2


def test_an_ec2_rebalance_recommendation_is_a_hint_and_the_notice_still_comes(
    watch: Start,
) -> None:
    with MetadataService("ec2") as service:
        watched = watch(source_for(service))
        service.hint()
        assert watched.next() == Notice("ec2-rebalance", None, stop=False)
        service.announce(60.0)
        assert watched.next().stop


@pytest.mark.parametrize(
    ("event_type", "machines", "is_notice"),
    [
        ("Preempt", ["trainer-0"], True),
        ("Preempt", ["other", "trainer-0"], True),
        ("Terminate", ["trainer-0"], True),
        ("Preempt", ["other"], False),
        ("Freeze", ["trainer-0"], False),
    ],
)
def test_azure_events_count_when_they_end_this_machine(
    watch: Start, event_type: str, machines: list[str], is_notice: bool
) -> None:
    with MetadataService("azure") as service:
        watched = watch(source_for(service))
        service.schedule(event_type, machines, None)
        if is_notice:
            assert watched.next() == Notice("azure", 0.0, stop=True)
        else:
            wait_until(lambda: len(service.requests) >= 10)
            assert watched.is_quiet(0.1)


@pytest.mark.parametrize(
    ("block", "seconds_left"), [({}, 30.0), ({"deadline_s": 120.0}, None)], ids=["30 s", "120 s"]
)
def test_gce_names_no_time_so_the_block_may(
    watch: Start, block: dict[str, float], seconds_left: float | None
) -> None:
    with MetadataService("gce") as service:
        (source,) = configured_sources(NoticeConfig(cloud="gce", **block), service.environ)
        service.announce(60.0)
        assert watch(source).next() == Notice("gce", seconds_left, stop=True)


def test_gce_answers_within_the_long_poll_not_after_it(watch: Start) -> None:
    with MetadataService("gce") as service:
        watched = watch(source_for(service))
        wait_until(lambda: len(service.requests) >= 2)
        begin_s = time.monotonic()
        service.announce(30.0)
        watched.next()
        assert time.monotonic() - begin_s < 2.0
        # One at once, one that waited: it does not poll in between.
        assert len(service.requests) <= 3


@pytest.mark.parametrize(
    ("content", "seconds_left"),
    [(b"", None), (b"42.5\n", 42.5), (b"soon", None), (b"nan", None), (b"-3", None)],
)
def test_a_file_that_appears_is_a_notice(
    tmp_path: Path, watch: Start, content: bytes, seconds_left: float | None
) -> None:
    path = tmp_path / "below" / "notice"
    watched = watch(file_source(path, period_s=PERIOD_S))
    assert watched.is_quiet(0.1)
    path.parent.mkdir()
    partial = path.with_name("partial")
    partial.write_bytes(content)
    partial.rename(path)
    assert watched.next() == Notice("file", seconds_left, stop=True)
    assert watched.is_quiet(0.2)


def test_a_file_of_an_earlier_run_is_no_notice_until_it_is_written_anew(
    tmp_path: Path, watch: Start
) -> None:
    path = tmp_path / "notice"
    path.touch()
    os.utime(path, (1_000_000_000, 1_000_000_000))
    watched = watch(file_source(path, period_s=PERIOD_S))
    assert watched.is_quiet(0.2)
    path.touch()
    assert watched.next().stop


def test_a_file_that_appeared_while_the_process_was_starting_is_a_notice(
    tmp_path: Path, watch: Start
) -> None:
    path = tmp_path / "notice"
    path.touch()
    assert watch(file_source(path, period_s=PERIOD_S)).next().stop


@pytest.mark.parametrize(
    ("firmware", "platform"),
    [
        ({"sys_vendor": "Amazon EC2"}, "ec2"),
        ({"sys_vendor": "Xen", "bios_version": "4.11.amazon"}, "ec2"),
        ({"sys_vendor": "Google", "product_name": "Google Compute Engine"}, "gce"),
        (
            {
                "sys_vendor": "Microsoft Corporation",
                "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77",
            },
            "azure",
        ),
        ({"sys_vendor": "Microsoft Corporation", "product_name": "Virtual Machine"}, None),
        ({"sys_vendor": "Alibaba Cloud"}, "alibaba"),
        ({"sys_vendor": "Tencent Cloud"}, "tencent"),
        ({"sys_vendor": "QEMU"}, None),
        ({}, None),
    ],
)
def test_the_firmware_tells_the_platform(
    tmp_path: Path, firmware: dict[str, str], platform: str | None
) -> None:
    for name, value in firmware.items():
        (tmp_path / name).write_text(value + "\n")
    assert find_platform({}, tmp_path) == platform


def test_the_environment_tells_the_platform_before_the_firmware(tmp_path: Path) -> None:
    (tmp_path / "sys_vendor").write_text("Amazon EC2\n")
    assert find_platform({"GCE_METADATA_HOST": "127.0.0.1:1"}, tmp_path) == "gce"
    assert find_platform({"AWS_EC2_METADATA_DISABLED": "true"}, tmp_path) is None
    assert find_platform({"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://h"}, tmp_path) == "ec2"


def test_the_block_chooses_the_sources_and_a_running_one_is_found_by_its_variable(
    tmp_path: Path, watch: Start
) -> None:
    with MetadataService("ec2") as service:
        config = NoticeConfig(file=str(tmp_path / "notice"))
        sources = configured_sources(config, service.environ)
        assert [source.name for source in sources] == ["file", "ec2"]
        service.announce(60.0)
        assert watch(sources[1]).next().stop
        assert configured_sources(NoticeConfig(cloud="none"), service.environ) == []


@pytest.mark.parametrize(
    ("name", "form", "hours"),
    [
        ("alibaba", "%Y-%m-%dT%H:%M:%SZ", 0),
        ("tencent", "%Y-%m-%d %H:%M:%S", 8),
        ("huawei", '{"action": "terminate", "timestamp": "%Y-%m-%dT%H:%M:%SZ"}', 0),
        ("huawei", '{"action": "terminate"}', None),
    ],
)
def test_each_cloud_with_a_url_states_its_time_in_its_own_way(
    watch: Start, name: str, form: str, hours: int | None
) -> None:
    with MetadataService("url") as service:
        doom_s = time.time() + 120 + 3600 * (hours or 0)
        service.misbehave = Answer(200, time.strftime(form, time.gmtime(doom_s)).encode())
        source = url_source(name, f"http://{service.address}/doom", period_s=PERIOD_S)
        notice = watch(source).next()
        assert (notice.source, notice.stop) == (name, True)
        expected = None if hours is None else pytest.approx(120, abs=5)
        assert notice.seconds_left == expected


def test_the_block_takes_every_cloud_by_name_and_any_url() -> None:
    for cloud in ("alibaba", "tencent", "huawei"):
        (source,) = configured_sources(NoticeConfig(cloud=cloud), {})
        assert source.name == cloud
    (source,) = configured_sources(NoticeConfig(cloud="http://127.0.0.1:1/doom"), {})
    assert source.name == "url"
    for wrong in ("aws", "https://h/doom"):
        with pytest.raises(ConfigError, match=r"notice\.cloud: .*alibaba, tencent, huawei"):
            parse_block({"path": "/x", "notice": {"cloud": wrong}})


@pytest.mark.parametrize(
    "url", ["https://h", "ftp://h", "http://", "http://h:99999", "http://h/\r"]
)
def test_an_endpoint_that_cannot_be_used_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError):
        ec2_source({"AWS_EC2_METADATA_SERVICE_ENDPOINT": url})
