"""Which processes of a launch are found, and which of them hear a notice."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from spotspeed.supervised import EXPORTED, VARIABLE
from spotspeed.supervisor.processes import Member, end_all, members, send

LISTEN = "import signal, sys; signal.signal(signal.{}, print); print(1, flush=True); "
WAIT = "sys.stdin.read()"


class Family:
    """Processes that carry one mark; they leave when their stdin is closed."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, *words: str, mark: str = VARIABLE, **environ: str) -> subprocess.Popen[str]:
        """Returns once the process has written its first line."""
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, mark: self.mark, **environ},
        )  # fmt: skip
        self._processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline()
        return process

    def python(self, code: str, **environ: str) -> subprocess.Popen[str]:
        return self.start(sys.executable, "-c", code, **environ)

    def find(self, *attached: subprocess.Popen[str]) -> dict[int, Member]:
        pids = {process.pid for process in attached}
        return {member.pid: member for member in members(self.mark, pids, environ={})}

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
    term = family.python(LISTEN.format("SIGTERM") + WAIT)
    found = family.find(usr1, term)
    assert found[usr1.pid].is_rank and found[term.pid].is_rank, "no launcher has to name a rank"
    assert found[usr1.pid].hears is signal.SIGUSR1
    assert found[term.pid].hears is signal.SIGTERM


def test_what_a_signal_would_kill_or_end_is_not_told(family: Family) -> None:
    deaf = family.python("import sys; print(1, flush=True); " + WAIT, RANK="0")
    shell = family.start("bash", "-c", "echo 1; read line; exit", RANK="0")
    launcher = family.python(LISTEN.format("SIGTERM") + WAIT)
    worker = family.python(LISTEN.format("SIGTERM") + WAIT, RANK="0")
    all_ = (deaf, shell, launcher, worker)
    found = family.find(deaf)
    assert {process.pid for process in all_} <= set(found)
    assert [found[process.pid].hears for process in all_] == [None] * 4
    assert [found[process.pid].is_rank for process in all_] == [True, True, False, True]


def test_a_mark_that_deepspeed_passes_on_over_pdsh_is_enough(family: Family) -> None:
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    runner = Path(spec.origin).with_name("launcher") / "runner.py"
    (prefixes,) = re.findall(r"^EXPORT_ENVS = (\[.*\])$", runner.read_text(), re.MULTILINE)
    assert any(EXPORTED.startswith(prefix) for prefix in ast.literal_eval(prefixes))
    process = family.start(sys.executable, "-c", "print(1, flush=True); input()", mark=EXPORTED)
    assert process.pid in family.find()


def test_a_variable_that_the_supervisor_has_itself_makes_no_rank(family: Family) -> None:
    task = family.python(LISTEN.format("SIGTERM") + WAIT, SLURM_PROCID="0")
    (member,) = members(family.mark, environ={"SLURM_PROCID": "0"})
    assert member.pid == task.pid and not member.is_rank
    step = family.python(LISTEN.format("SIGTERM") + WAIT, SLURM_PROCID="0", SLURM_STEP_ID="3")
    found = {each.pid: each for each in members(family.mark, environ={"SLURM_PROCID": "0"})}
    assert found[step.pid].is_rank, "as srun's tasks below a batch script"
    step.kill()
    step.wait()
    (member,) = members(family.mark, {task.pid}, environ={"SLURM_PROCID": "0"})
    assert member.is_rank and member.hears is signal.SIGTERM, "it has told that it is one"


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
    assert end_all(partial(members, family.mark, (), {}), grace_s=0.2) == 2
    assert process.wait(30) == -signal.SIGKILL
    assert not family.find()


def test_whoever_calls_again_ends_the_grace(family: Family) -> None:
    code = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"
    process = family.python(f"{code}; {WAIT}")
    find = partial(members, family.mark, (), {})
    assert end_all(find, grace_s=600.0, is_urgent=lambda: True) == 1
    assert process.wait(30) == -signal.SIGKILL
