"""What other people's clients read from the emulated metadata services, also at the true address.

In a network namespace of its own, 169.254.169.254 is this machine's to give.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from spotspeed.testing.metadata import MetadataService
from tests.ranks import ROOT

ADDRESS = "169.254.169.254"
LIMIT_S = 120
SET_UP = f"ip link set lo up && ip addr add {ADDRESS}/32 dev lo && "
READ = """
import ec2_metadata, json
found = ec2_metadata.ec2_metadata.spot_instance_action
print(json.dumps(None if found is None else [found.action, found.time.isoformat()]))
"""
WATCH = """
import queue
from spotspeed.config import NoticeConfig
from spotspeed.coordinator.notice import configured_sources
heard = queue.Queue()
(source,) = configured_sources(NoticeConfig(cloud="ec2"), {})
source.start(heard.put)
notice = heard.get(timeout=60)
source.stop()
print(notice.source, notice.stop, 50 < notice.seconds_left <= 60)
"""


@pytest.fixture
def client() -> object:
    """A new client of ec2-metadata, which has asked nothing yet."""
    module = pytest.importorskip(
        "ec2_metadata", reason="ec2-metadata is not installed: pip install ec2-metadata"
    )
    return module.EC2Metadata()


def in_namespace(script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script as the only user of a network; skips where that is not allowed."""
    probe = ["unshare", "--net", "sh", "-c", SET_UP + "true"]
    try:
        refusal = subprocess.run(probe, capture_output=True, text=True, timeout=LIMIT_S)
    except OSError as error:
        pytest.skip(f"no network namespaces: {error}")
    if refusal.returncode:
        pytest.skip(f"no network namespaces: {refusal.stderr.strip()}")
    return subprocess.run(["unshare", "--net", "sh", "-c", SET_UP + script], cwd=ROOT,
                          capture_output=True, text=True, timeout=LIMIT_S)  # fmt: skip


def test_ec2_metadata_reads_the_notice_that_the_emulated_service_gives(client) -> None:
    with MetadataService("ec2") as service:
        client.service_url = f"http://{service.address}/latest/"
        client.metadata_url = f"{client.service_url}meta-data/"
        assert client.spot_instance_action is None
        service.announce(95.0)
        found = client.spot_instance_action
        assert found.action == "terminate"
        left = found.time - datetime.now(UTC)
        assert timedelta(seconds=85) < left <= timedelta(seconds=95)
        service.forget_tokens()
        client.clear_all()
        assert client.spot_instance_action.action == "terminate"


def test_spotspeed_emulate_serves_both_clients_at_the_address_of_the_cloud(client) -> None:
    """The verb of the command line, with nothing that leads the clients there."""
    python, serve = sys.executable, f"-m spotspeed emulate ec2 --host {ADDRESS} --port 80"
    # The watcher starts before the notice, the other client asks after it.
    script = (
        f"unset AWS_EC2_METADATA_SERVICE_ENDPOINT; {python} {serve} --after 0 --left 60 & "
        f"emulator=$!; {python} -c '{WATCH}' && {python} -c '{READ}'; code=$?; "
        f"kill $emulator; wait $emulator; exit $code"
    )
    done = in_namespace(script)
    assert done.returncode == 0, done.stderr
    told, watched, read = done.stdout.splitlines()
    assert told == f"export AWS_EC2_METADATA_SERVICE_ENDPOINT=http://{ADDRESS}:80"
    assert watched == "ec2 True True"
    assert json.loads(read)[0] == "terminate"
