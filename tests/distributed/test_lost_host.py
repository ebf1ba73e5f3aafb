"""Several hosts, one mpirun: what a lost link, a killed rank and a notice cost."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.job import Job, Launch, Launcher, scripts
from tests.namespaces import Hosts

pytestmark = [pytest.mark.ranks, pytest.mark.full]
PEER_TIMEOUT_S = 6.0
EVERY = 2
STEPS = 16
Blow = Callable[[Hosts, Launch], None]


def link_down(hosts: Hosts, launch: Launch) -> None:
    """Nobody is told anything; the ranks there live on."""
    hosts.yank(2)


def killed(hosts: Hosts, launch: Launch) -> None:
    launch.ranks()[2].kill()


def notice(hosts: Hosts, launch: Launch) -> None:
    """To a rank that is on another host than the supervisor."""
    launch.ranks()[1].send_signal(signal.SIGUSR1)


def supervised_on(hosts: Hosts, job: Job) -> Launcher:
    """mpirun over all hosts, from the first of them."""

    def words(ranks: int, port: int) -> list[str]:
        return hosts.on(0, [
            sys.executable, "-m", "spotspeed", "supervise", "--relaunch", "--max-restarts", "2",
            "--hostfile", str(hosts.hostfile), "--min-ranks", "2",
            "--ds-config", str(job.folder / "ds_config.json"), "--",
            scripts("mpirun"), "-n", "{ranks}", "--hostfile", "{hostfile}", "--bind-to", "none",
            "--allow-run-as-root", "--prtemca", "plm_ssh_agent", str(hosts.agent),
            "--prtemca", "prte_if_include", "eth0", "--mca", "btl", "self,tcp",
            "--mca", "btl_tcp_if_include", "eth0", sys.executable,
        ])  # fmt: skip

    return words


@pytest.mark.parametrize(("blow", "ranks_after", "lost_max"), [
    # What was trained after the last sealed save; one more may have been on its way.
    pytest.param(link_down, 2, 2 * EVERY, id="link-down"),
    pytest.param(killed, 3, 2 * EVERY, id="killed"),
    pytest.param(notice, 3, 0, id="notice"),
])  # fmt: skip
def test_a_job_over_several_hosts_goes_on_after(
    blow: Blow, ranks_after: int, lost_max: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = {
        "interval": {"steps": EVERY, "seconds": None},
        "coordinator": {"peer_timeout_s": PEER_TIMEOUT_S},
    }
    job = Job(tmp_path / "job", block=block)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    with (
        Hosts(3, tmp_path / "hosts") as hosts,
        job.start(3, launcher=supervised_on(hosts, job), steps=STEPS) as launch,
    ):
        launch.wait_step(5)
        launch.wait_until(lambda: bool(job.sealed()))
        blow(hosts, launch)
        finished = launch.finish()
    assert finished.returncode == 0, finished.output[-6000:]
    assert finished.output.count("starting again") == 1, finished.output[-6000:]
    steps = [record["step"] for record in launch.records()]
    before, _, _ = finished.output.partition("starting again")
    resumed = len(re.findall(r"^step +\d+  loss", before, re.MULTILINE))
    lost = steps[resumed - 1] - steps[resumed] + 1
    print(f"{blow.__name__}: {lost} steps lost, a save every {EVERY}")
    assert 0 <= lost <= lost_max
    # Nothing is skipped, and whoever was cut off has sealed nothing beside the others.
    assert steps == [*range(1, steps[resumed - 1] + 1), *range(steps[resumed], STEPS + 1)]
    assert {record["ranks"] for record in launch.records()[resumed:]} == {ranks_after}
    assert job.sealed()[0] == STEPS
