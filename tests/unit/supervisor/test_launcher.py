"""Command lines, hostfiles and the start of a launcher."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spotspeed.cli_job import app, parse_plan
from spotspeed.core.relaunch import Batch
from spotspeed.errors import ConfigError
from spotspeed.supervisor import hosts as hosts_module
from spotspeed.supervisor.hosts import (
    Host,
    addresses,
    answers_ssh,
    is_here,
    new_master,
    reachable,
    read_batch,
    read_hostfile,
    write_hostfile,
)
from spotspeed.supervisor.launcher import Launch, Place, fill
from spotspeed.supervisor.notifying import notify_all


def test_placeholders_are_filled_in_everywhere() -> None:
    command = ["mpirun", "-n", "{ranks}", "--hostfile={hostfile}", "x", "--port", "{port}"]
    filled = fill(command, Place(3, "hosts", 7))
    assert filled == ["mpirun", "-n", "3", "--hostfile=hosts", "x", "--port", "7"]


def test_a_placeholder_without_a_value_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"\{ranks\}"):
        fill(["mpirun", "-n", "{ranks}"], Place())


@pytest.mark.parametrize(("command", "filled"), [
    (["a/deepspeed", "x.py"], ["a/deepspeed", "--master_port=7", "x.py"]),
    (["torchrun", "x.py"], ["torchrun", "--master-port=7", "x.py"]),
    (["torchrun", "--master_port", "5", "x.py"], ["torchrun", "--master_port", "5", "x.py"]),
    (["torchrun", "--standalone", "x.py"], ["torchrun", "--standalone", "x.py"]),
    (["mpirun", "x"], ["mpirun", "x"]),
])  # fmt: skip
def test_launchers_that_choose_the_port_by_an_option_get_a_new_one(
    command: list[str], filled: list[str]
) -> None:
    assert fill(command, Place(port=7)) == filled
    assert fill(command, Place()) == command


def test_the_launchers_own_options_are_not_the_supervisors() -> None:
    plan = parse_plan(["--ranks", "4", "mpirun", "--ranks", "9", "--relaunch", "x", "--win", "3"])
    assert plan.command == ("mpirun", "--ranks", "9", "--relaunch", "x", "--win", "3")
    assert plan.ranks == 4 and not plan.relaunch


@pytest.mark.parametrize(
    "words",
    ["--deadline nan", "--deadline -5", "--deadline 0", "--window nan", "--backoff -1",
     "--max-restarts -1", "--ranks 0", "--ranks x", "--min-ranks 0", "--ssh-port 99999",
     "--json /", "--json /no/such/folder/report.json"],
)  # fmt: skip
def test_an_option_that_makes_no_sense_is_named_before_anything_is_launched(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse_plan([*words.split(), "--", "true"])
    assert left.value.code == 2
    assert words.split(maxsplit=1)[0] in capsys.readouterr().err


def test_a_report_that_cannot_be_written_does_not_hide_what_the_job_came_to(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "reports"
    folder.mkdir()
    words = ["--no-watch-host", "--json", str(folder / "report.json"), "--", "rmdir", str(folder)]
    done = CliRunner().invoke(app, ["supervise", *words])
    assert done.exit_code == 0, done.output
    assert "the report cannot be written" in done.output and "report.json" in done.output


def test_an_empty_path_is_nobodys_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    def everybody() -> list[str]:
        raise AssertionError("every job here was to be told")

    monkeypatch.setattr("spotspeed.cli_job.paths_here", everybody)
    assert CliRunner().invoke(app, ["notify", ""]).exit_code == 2


def test_a_job_that_has_left_meanwhile_keeps_no_other_from_being_told(tmp_path: Path) -> None:
    gone = [str(tmp_path / name) for name in ("a", "b")]
    assert notify_all(gone, seconds_left=None) == []


def test_a_launcher_leads_a_session_with_a_clean_signal_mask(tmp_path: Path) -> None:
    file = tmp_path / "out"
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        code = f"(ps -o sid= -p $$; grep SigBlk /proc/$$/status) > {file}; exit 75"
        launch = Launch(["sh", "-c", code], os.environ, set())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    deadline = time.monotonic() + 60
    while (exit_code := launch.poll()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert exit_code == 75
    session, _, mask = file.read_text().split()
    assert (int(session), int(mask, 16)) == (launch.pid, 0)


def test_a_launcher_that_does_not_exist_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError, match="no-such-launcher"):
        Launch(["no-such-launcher"], os.environ, set())


def test_a_hostfile_is_read_written_and_cut_to_the_hosts_that_answer(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# ours\na slots=4\nb slots = 2  # slow\n\nc\n")
    hosts = read_hostfile(str(file))
    assert hosts == [Host("a", 4), Host("b", 2), Host("c", 1)]
    left = reachable(hosts, lambda name: name != "b")
    write_hostfile(str(file), left)
    assert read_hostfile(str(file)) == [Host("a", 4), Host("c", 1)]


def test_this_machine_needs_no_ssh_by_whichever_of_its_names_and_addresses() -> None:
    names = ("localhost", socket.gethostname(), "127.0.0.1", "127.0.1.1", *addresses("localhost"))
    for name in names:
        assert is_here(name) and answers_ssh(name), name
    assert not is_here("192.0.2.1"), "an address for documentation (RFC 5737)"
    assert not is_here("no-such-host.invalid")


def test_a_host_is_asked_at_the_port_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts_module, "is_here", lambda name: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert answers_ssh("127.0.0.1", port)
    assert not answers_ssh("127.0.0.1", port)


def test_a_host_is_asked_where_ssh_would_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ssh = tmp_path / "ssh"
        ssh.write_text(
            f'#!/bin/sh\necho "user me"\necho "hostname 127.0.0.1"\necho "port {port}"\n'
        )
        ssh.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(hosts_module, "is_here", lambda name: False)
        assert answers_ssh("an-alias")


def test_a_master_that_is_gone_is_replaced_by_the_first_host_left() -> None:
    hosts = [Host("192.0.2.1", 1), Host("192.0.2.2", 1), Host("192.0.2.3", 1)]
    assert new_master("192.0.2.1", hosts, hosts[1:]) == "192.0.2.2"
    assert new_master("192.0.2.2", hosts, hosts[1:]) is None
    assert new_master("198.51.100.7", hosts, hosts[1:]) is None, "another network of the hosts"
    assert new_master("localhost", [Host("127.0.0.1", 1), hosts[0]], hosts[:1]) == "192.0.2.1"
    assert new_master(None, hosts, hosts[1:]) is None


def test_a_line_that_is_no_host_is_named(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("a slots=4\nb max-slots=x y\n")
    with pytest.raises(ConfigError, match="hosts:2"):
        read_hostfile(str(file))


def test_the_batch_is_that_of_the_config_or_none(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"train_batch_size": 6, "train_micro_batch_size_per_gpu": 2}')
    assert read_batch(str(file)) == Batch(6, 2)
    file.write_text(
        '{"train_batch_size": 6, "train_micro_batch_size_per_gpu": 4,'
        ' "spotspeed": {"path": "/x", "elastic": {"indivisible": "micro_batch"}}}'
    )
    assert read_batch(str(file)) == Batch(6, 1), "smaller micro batches will do"
    file.write_text('{"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 2}')
    assert read_batch(str(file)) is None
