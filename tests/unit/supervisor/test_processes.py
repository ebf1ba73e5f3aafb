"""Which processes of a launch are found, and which of them hear a notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from spotspeed.supervised import VARIABLE
from spotspeed.supervisor.processes import Member, end_all, members, send

LISTEN = "import signal, sys; signal.signal(signal.{}, print); print(1, flush=True); "
WAIT = "sys.stdin.read()"


class Family:
    """Processes that carry one mark; they leave when their stdin is closed."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, *words: str, **environ: str) -> subprocess.Popen[str]:
        """Returns once the process has written its first line."""
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, VARIABLE: self.mark, **environ},
        )  # fmt: skip
        self._processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline()
        return process

    def python(self, code: str, **environ: str) -> subprocess.Popen[str]:
        return self.start(sys.executable, "-c", code, **environ)

    def find(self) -> dict[int, Member]:
        return {member.pid: member for member in members(self.mark, environ={})}

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    family = Family(str(tmp_path / "launch-0"))
    yield family
    family.close()


def test_a_rank_hears_by_the_signal_that_it_listens_to(family: Family) -> None:
    usr1 = family.python(LISTEN.format("SIGUSR1") + WAIT, RANK="0")
    term = family.python(LISTEN.format("SIGTERM") + WAIT, OMPI_COMM_WORLD_RANK="1")
    found = family.find()
    assert found[usr1.pid].hears is signal.SIGUSR1
    assert found[term.pid].hears is signal.SIGTERM


def test_what_a_signal_would_kill_or_end_is_not_told(family: Family) -> None:
    deaf = family.python("import sys; print(1, flush=True); " + WAIT, RANK="0")
    shell = family.start("bash", "-c", "echo 1; read line; exit", RANK="0")
    launcher = family.python(LISTEN.format("SIGTERM") + WAIT)
    found = family.find()
    assert {deaf.pid, shell.pid, launcher.pid} <= set(found)
    assert [found[process.pid].hears for process in (deaf, shell, launcher)] == [None] * 3


def test_a_variable_that_the_supervisor_has_itself_makes_no_rank(family: Family) -> None:
    task = family.python(LISTEN.format("SIGTERM") + WAIT, SLURM_PROCID="0")
    (member,) = members(family.mark, environ={"SLURM_PROCID": "0"})
    assert member.pid == task.pid and not member.is_rank


def test_processes_without_the_mark_are_none_of_ours(family: Family) -> None:
    assert os.getpid() not in family.find()


def test_a_process_id_that_belongs_to_somebody_else_by_now_gets_no_signal(
    family: Family,
) -> None:
    process = family.python("import sys; print(1, flush=True); " + WAIT)
    member = family.find()[process.pid]
    assert not send(replace(member, ticks=member.ticks - 1), signal.SIGKILL)
    assert process.poll() is None
    assert send(member, signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert not send(member, signal.SIGKILL)


def test_ending_all_reaches_orphans_and_kills_what_does_not_go(family: Family) -> None:
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork() == 0:\n    os.setsid()\n"
        "print(1, flush=True)\ntime.sleep(600)"
    )
    process = family.python(code)
    assert process.stdout is not None and process.stdout.readline(), "the child is up, too"
    assert len(family.find()) == 2
    assert end_all(partial(members, family.mark, {}), grace_s=0.2) == 2
    assert process.wait(30) == -signal.SIGKILL
    assert not family.find()
