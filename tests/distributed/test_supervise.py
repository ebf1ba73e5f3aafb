"""`spotspeed supervise` above real launchers: notices, exit codes, relaunch."""

from __future__ import annotations

import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.distributed.job import (
    LIMIT_S,
    TRAIN,
    Job,
    Launch,
    Launcher,
    by_deepspeed,
    by_mpirun,
    ds_config,
    scripts,
)
from tests.ranks import ROOT, free_port

pytestmark = pytest.mark.ranks


def by_torchrun(ranks: int, port: int) -> list[str]:
    return [scripts("torchrun"), "--nproc-per-node", str(ranks), "--master-port", str(port),
            "--"]  # fmt: skip


def plain_launch(folder: Path, code: str, *options: str) -> Launch:
    """A supervised Python program that knows nothing of spotspeed."""
    words = [sys.executable, "-m", "spotspeed", "supervise", *options, "--",
             sys.executable, "-c", code]  # fmt: skip
    return Launch(Job(folder / "plain"), free_port(), words)


def by_python(ranks: int, port: int) -> list[str]:
    """One process and no launcher: nothing in its environment says that it is a rank."""
    return [sys.executable]


def by_pdsh(ranks: int, port: int) -> list[str]:
    """`deepspeed` for several hosts; this pdsh runs the command here, in an empty environment."""
    return ["sh", "-c", PDSH, "pdsh", scripts("deepspeed"), "--force_multi", "--no_ssh_check",
            "--hostfile", "HOSTS", "--master_addr", "127.0.0.1", "--master_port",
            str(port)]  # fmt: skip


PDSH = r"""
folder=$(mktemp -d) && trap 'rm -r "$folder"' EXIT
printf 'localhost slots=2\n' > "$folder/hosts"
cat > "$folder/pdsh" <<'END'
#!/bin/sh
while [ "$1" != "-w" ]; do shift; done
shift 2
for name in HOME PATH TORCH_EXTENSIONS_DIR DS_ACCELERATOR; do
    kept="$kept $name=$(printenv $name)"
done
exec env -i $kept sh -c "$(echo "$*" | sed 's/%n/0/')"
END
chmod +x "$folder/pdsh"
for word; do
    shift
    [ "$word" = HOSTS ] && word="$folder/hosts"
    set -- "$@" "$word"
done
PATH="$folder:$PATH" "$@"
"""


def within_a_pod(launcher: Launcher) -> Launcher:
    """The supervisor itself has a rank, as in the pods of a PyTorchJob."""

    def words(ranks: int, port: int) -> list[str]:
        return ["env", "RANK=0", *launcher(ranks, port)]

    return words


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
    pytest.param(by_python, signal.SIGTERM, id="python-SIGTERM", marks=pytest.mark.full),
    pytest.param(by_pdsh, signal.SIGTERM, id="pdsh-SIGTERM", marks=pytest.mark.full),
])  # fmt: skip
def test_a_signal_to_the_supervisor_makes_the_last_step_durable_and_leaves_with_75(
    launcher: Launcher, number: signal.Signals, tmp_path: Path
) -> None:
    """The script has workers that it has told nobody of; the supervisor is in a pod of a job."""
    job = Job(tmp_path / "job")
    launcher = within_a_pod(supervised(launcher))
    with job.start(2, launcher=launcher, more=("--workers", "1")) as launch:
        launch.wait_step(3)
        launch.process.send_signal(number)
        finished = launch.finish()
    assert finished.returncode == 75, finished.output[-6000:]
    assert job.sealed()[0] == launch.records()[-1]["step"]
    assert f"{number.name}: the ranks have 120 s" in finished.output
    assert "DataLoader worker" not in finished.output, "a worker was told, which kills it"
    # The launcher may be slow to leave where others work beside it.
    ended = finished.output.replace("the ranks have left and the launcher stays: ending", "")
    assert "ending the launch" not in ended, "the ranks have left by themselves"


@pytest.mark.full
def test_ranks_that_listen_to_no_signal_hear_through_their_saver(tmp_path: Path) -> None:
    job = Job(tmp_path / "job", block={"notice": {"signals": []}})
    with job.start(2, launcher=supervised(by_torchrun, "--deadline", "60")) as launch:
        launch.wait_step(3)
        launch.process.send_signal(signal.SIGTERM)
        finished = launch.finish()
    assert finished.returncode == 75, finished.output[-6000:]
    assert job.sealed()[0] == launch.records()[-1]["step"]
    assert "source=notify" in finished.output and "ending the launch" not in finished.output


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


@pytest.mark.full
@pytest.mark.parametrize("launcher", [by_torchrun, by_deepspeed])
def test_a_launcher_that_says_1_of_a_killed_rank_is_started_again(
    launcher: Launcher, tmp_path: Path
) -> None:
    """The only rank: nobody is left to say anything."""
    job = Job(tmp_path / "job", block={"interval": {"steps": 2}})
    with job.start(1, launcher=supervised(launcher, "--relaunch"), steps=14) as launch:
        launch.wait_step(4)
        launch.ranks()[0].kill()
        finished = launch.finish()
    assert finished.returncode == 0, finished.output[-6000:]
    assert finished.output.count("starting again") == 1, finished.output[-6000:]
    assert launch.records()[-1]["step"] == 14


@pytest.mark.full
@pytest.mark.parametrize("launcher", [by_torchrun, by_mpirun])
@pytest.mark.parametrize("error", ["raise ValueError('mine')", "raise RuntimeError('mine')"])
def test_an_error_of_the_script_in_one_rank_is_not_started_again(
    launcher: Launcher, error: str, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    line = "        updates = engine.global_steps\n"
    assert line in TRAIN.read_text()
    condition = "if distributed.get_rank() == 1 and engine.global_steps == 2:"
    more = f"{line}        {condition}\n            {error}\n"
    script.write_text(TRAIN.read_text().replace(line, more))
    job = Job(tmp_path / "job", script=script)
    with job.start(2, launcher=supervised(launcher, "--relaunch")) as launch:
        finished = launch.finish()
    assert finished.returncode == 1, finished.output[-6000:]
    assert "starting again" not in finished.output
    kind = error.split()[1].partition("(")[0]
    assert f"the script failed with {kind}; leaving with 1" in finished.output


@pytest.mark.full
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


@pytest.mark.full
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


class Terminal:
    """A supervised Python program at a terminal of its own."""

    def __init__(self, code: str) -> None:
        self.output = ""
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            words = [
                sys.executable,
                "-m",
                "spotspeed",
                "supervise",
                "--",
                sys.executable,
                "-c",
                code,
            ]
            os.execve(words[0], words, {**os.environ, "PYTHONPATH": str(ROOT)})

    def press(self, key: bytes) -> None:
        os.write(self._master, key)

    def wait_for(self, text: str) -> None:
        """Read until `text` has come since the last call."""
        while text not in self.output:
            ready, _, _ = select.select([self._master], [], [], LIMIT_S)
            assert ready, self.output
            self.output += os.read(self._master, 65536).decode()
        self.output = self.output.partition(text)[2]

    def hang_up(self) -> None:
        os.close(self._master)

    def finish(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); " \
    "print('up', flush=True); time.sleep(600)"  # fmt: skip


def test_at_a_terminal_ctrl_z_is_refused_and_the_second_ctrl_c_ends_everything_now() -> None:
    terminal = Terminal(DEAF)
    terminal.wait_for("up")
    terminal.press(b"\x1a")
    terminal.wait_for("not stopped: the job would train on unwatched")
    terminal.press(b"\x03")
    terminal.wait_for("SIGINT: the ranks have 120 s")
    terminal.press(b"\x03")
    terminal.wait_for("told to stop now: ending the launch")
    terminal.wait_for("leaving with 76")
    assert terminal.finish() == 76


def test_ctrl_backslash_leaves_no_orphans(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    terminal = Terminal(f"import os; open({str(file)!r}, 'w').write(str(os.getpid())); {DEAF}")
    terminal.wait_for("up")
    terminal.press(b"\x1c")
    terminal.wait_for("told to stop now")
    assert terminal.finish() == 76
    assert not psutil.pid_exists(int(file.read_text()))


def test_a_supervisor_whose_terminal_is_gone_does_its_work() -> None:
    """It cannot say a word any more."""
    terminal = Terminal(DEAF)
    terminal.wait_for("up")
    terminal.hang_up()
    os.kill(terminal.pid, signal.SIGQUIT)
    assert terminal.finish() == 76


def test_a_rank_that_does_not_leave_is_ended_when_the_time_is_over(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with plain_launch(
        tmp_path, DEAF, "--deadline", "1", "--relaunch", "--json", str(report)
    ) as launch:
        launch.wait_until(lambda: "up" in launch.output)
        launch.process.send_signal(signal.SIGTERM)
        launch.wait_until(lambda: "the time is over" in launch.output)
        launch.process.send_signal(signal.SIGTERM)
        finished = launch.finish()
    assert finished.returncode == 76, finished.output
    assert "starting again" not in finished.output, "the supervisor itself was told to leave"
    document = json.loads(report.read_text())
    (run,) = document["launches"]
    assert (document["code"], run["ending"], run["epochs"]) == (76, "not_durable", {})


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
