"""`spotspeed supervise` above real launchers: notices, exit codes, relaunch."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.distributed.job import (
    Job,
    Launch,
    Launcher,
    by_deepspeed,
    by_mpirun,
    ds_config,
    scripts,
)
from tests.ranks import free_port

pytestmark = pytest.mark.ranks


def by_torchrun(ranks: int, port: int) -> list[str]:
    return [scripts("torchrun"), "--nproc-per-node", str(ranks), "--master-port", str(port),
            "--"]  # fmt: skip


def plain_launch(folder: Path, code: str, *options: str) -> Launch:
    """A supervised Python program that takes itself for a rank and knows nothing of spotspeed."""
    words = [sys.executable, "-m", "spotspeed", "supervise", *options, "--", "env", "RANK=0",
             sys.executable, "-c", code]  # fmt: skip
    return Launch(Job(folder / "plain"), free_port(), words)


def supervised(launcher: Launcher, *options: str) -> Launcher:
    def words(ranks: int, port: int) -> list[str]:
        command = launcher(ranks, port)
        return [sys.executable, "-m", "spotspeed", "supervise", *options, "--", *command]

    return words


@pytest.mark.parametrize(("launcher", "number"), [
    pytest.param(by_mpirun, signal.SIGTERM, id="mpirun-SIGTERM"),
    pytest.param(by_torchrun, signal.SIGTERM, id="torchrun-SIGTERM"),
    pytest.param(by_deepspeed, signal.SIGINT, id="deepspeed-ctrl-c"),
    pytest.param(by_mpirun, signal.SIGHUP, id="mpirun-SIGHUP", marks=pytest.mark.full),
    pytest.param(by_torchrun, signal.SIGUSR1, id="torchrun-SIGUSR1", marks=pytest.mark.full),
    pytest.param(by_deepspeed, signal.SIGTERM, id="deepspeed-SIGTERM", marks=pytest.mark.full),
])  # fmt: skip
def test_a_signal_to_the_supervisor_makes_the_last_step_durable_and_leaves_with_75(
    launcher: Launcher, number: signal.Signals, tmp_path: Path
) -> None:
    job = Job(tmp_path / "job")
    with job.start(2, launcher=supervised(launcher)) as launch:
        launch.wait_step(3)
        launch.process.send_signal(number)
        finished = launch.finish()
    assert finished.returncode == 75, finished.output[-6000:]
    assert job.sealed()[0] == launch.records()[-1]["step"]
    assert f"{number.name}: the ranks have 120 s" in finished.output


def test_after_one_rank_is_killed_the_job_is_started_again_and_finishes(tmp_path: Path) -> None:
    job = Job(tmp_path / "job", block={"interval": {"steps": 2}})
    launcher = supervised(by_mpirun, "--relaunch", "--max-restarts", "2")
    with job.start(2, launcher=launcher, steps=14) as launch:
        launch.wait_step(4)
        launch.wait_until(lambda: bool(job.sealed()))
        launch.ranks()[1].kill()
        finished = launch.finish()
    assert finished.returncode == 0, finished.output[-6000:]
    assert finished.output.count("starting again") == 1, finished.output[-6000:]
    steps = [record["step"] for record in launch.records()]
    assert steps[-1] == 14 and job.sealed()[0] == 14
    job.losses()


def test_a_host_that_lost_slots_gets_fewer_ranks_with_the_same_global_batch(
    tmp_path: Path,
) -> None:
    job = Job(tmp_path / "job")
    hostfile, config = tmp_path / "hosts", job.folder / "ds_config.json"
    hostfile.write_text("localhost slots=3\n")

    def launcher(ranks: int, port: int) -> list[str]:
        options = ("--relaunch", "--hostfile", str(hostfile), "--ds-config", str(config))
        words = supervised(by_mpirun, *options)(ranks, port)
        words[words.index("-n") + 1] = "{ranks}"
        return words

    with job.start(0, launcher=launcher, steps=12) as launch:
        launch.wait_step(3)
        assert launch.records()[-1]["ranks"] == 3
        hostfile.write_text("localhost slots=1\n")
        launch.interrupt(signal.SIGUSR1, random.Random(1))
        finished = launch.finish()
    assert finished.returncode == 0, finished.output[-6000:]
    worlds = [record["ranks"] for record in launch.records()]
    steps = [record["step"] for record in launch.records()]
    assert sorted(set(worlds)) == [1, 3] and worlds == sorted(worlds, reverse=True)
    assert steps == list(range(1, 13)), "no step is lost or done twice"


def test_a_job_that_runs_on_fewer_ranks_is_started_again_on_as_many_as_its_batch_fits(
    tmp_path: Path,
) -> None:
    job = Job(tmp_path / "job", block={"elastic": {"indivisible": "fewer_ranks"}})
    block = {"path": str(job.path), **job.block}

    def launcher(ranks: int, port: int) -> list[str]:
        words = supervised(by_mpirun, "--relaunch", "--ranks", "2")(ranks, port)
        words[words.index("-n") + 1] = "{ranks}"
        return words

    with job.start(0, launcher=launcher, steps=2, config=ds_config(2, block, batch=9)) as launch:
        finished = launch.finish()
    assert finished.returncode == 0, finished.output[-6000:]
    assert "Start it on 1 ranks: `spotspeed supervise" in finished.output
    assert "does not run on 2 ranks; starting again on fewer" in finished.output
    assert [record["ranks"] for record in launch.records()] == [1, 1]


def test_a_refusal_is_not_started_again(tmp_path: Path) -> None:
    job = Job(tmp_path / "job", block={"no_such_key": 1})
    with job.start(1, launcher=supervised(by_torchrun, "--relaunch")) as launch:
        finished = launch.finish()
    assert finished.returncode == 77, finished.output[-6000:]
    assert "starting again" not in finished.output


def test_the_second_ctrl_c_ends_everything_now(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGUSR1, print); print('up', flush=True)"
    with plain_launch(tmp_path, f"{code}\nwhile True: time.sleep(1)") as launch:
        launch.wait_until(lambda: "up" in launch.output)
        launch.process.send_signal(signal.SIGINT)
        launch.wait_until(lambda: "SIGINT: the ranks have" in launch.output)
        launch.process.send_signal(signal.SIGINT)
        finished = launch.finish()
    assert finished.returncode == 137, finished.output
    assert "told to stop now" in finished.output


def test_a_rank_that_does_not_leave_is_ended_when_the_time_is_over(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGUSR1, print); print('up', flush=True)"
    program = f"{code}\nwhile True: time.sleep(1)"
    with plain_launch(tmp_path, program, "--deadline", "1", "--relaunch") as launch:
        launch.wait_until(lambda: "up" in launch.output)
        launch.process.send_signal(signal.SIGTERM)
        finished = launch.finish()
    assert finished.returncode == 143, finished.output
    assert "the time is over" in finished.output
    assert "starting again" not in finished.output, "the supervisor itself was told to leave"


def test_input_output_and_exit_code_are_the_launchers_own() -> None:
    words = [sys.executable, "-m", "spotspeed", "supervise", "--", "sh", "-c",
             "read word; echo $word; echo error >&2; exit 9"]  # fmt: skip
    done = subprocess.run(words, input="hello\n", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (9, "hello\n")
    assert done.stderr.startswith("error\nspotspeed supervise: failed with exit code 9")


def test_mpirun_that_is_told_to_end_itself_leaves_a_durable_step(tmp_path: Path) -> None:
    """mpirun gives its ranks half a second; what they have staged the saver finishes."""
    job = Job(tmp_path / "job")
    with job.start(2, launcher=supervised(by_mpirun)) as launch:
        launch.wait_step(3)
        children = psutil.Process(launch.process.pid).children()
        (mpirun,) = [child for child in children if "mpirun" in " ".join(child.cmdline())]
        mpirun.send_signal(signal.SIGTERM)
        finished = launch.finish()
    is_whole = bool(job.sealed()) and job.sealed()[0] == launch.records()[-1]["step"]
    assert (finished.returncode == 75) is is_whole, finished.output[-6000:]
