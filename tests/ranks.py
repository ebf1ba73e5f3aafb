"""Start real ranks under mpirun for a test, with a private port and a time limit.

`run_ranks` is for tests; run as a module, this file is the shim that each rank starts with. It
translates what mpirun sets into what DeepSpeed and torch read, then runs the script.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 10.0
"""How long mpirun may take to stop its ranks before it is killed itself."""


@dataclass(frozen=True, slots=True)
class Finished:
    """How a launch ended; `output` is what all ranks and mpirun wrote, together."""

    returncode: int
    output: str


class RanksFailed(AssertionError):
    """A launch ended with another exit code than 0, or not in time."""


def run_ranks(
    ranks: int,
    script: str | Path,
    *args: str,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> Finished:
    """Run `script` on so many ranks of this machine and wait for all of them.

    `script` is a path, absolute or from the repository's root; `env` is set on top of this
    process's environment. Raises RanksFailed after `timeout_s`, and with `check` also when the
    exit code is not 0; the message ends with the output.
    """
    port = free_port()
    command = launch_command(ranks, script, *args)
    with tempfile.TemporaryFile(mode="w+", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=rank_environment(port, env), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            process.wait(timeout_s)
            in_time = True
        except subprocess.TimeoutExpired:
            in_time = False
        finally:
            stop(process)
            remove_shared_memory(port)
        log.seek(0)
        finished = Finished(process.returncode, log.read())
    if not in_time:
        raise RanksFailed(f"{script}: not done after {timeout_s} s\n{finished.output[-8000:]}")
    if check and finished.returncode != 0:
        raise RanksFailed(f"{script}: exit {finished.returncode}\n{finished.output[-8000:]}")
    return finished


def launch_command(ranks: int, script: str | Path, *args: str) -> list[str]:
    """The mpirun command line that starts `script` on so many ranks of this machine."""
    mpirun = Path(sys.executable).with_name("mpirun")
    return [
        str(mpirun), "-n", str(ranks), "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none",
        "--allow-run-as-root", sys.executable, "-m", "tests.ranks", str(ROOT / script), *args,
    ]  # fmt: skip


def rank_environment(port: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with what ranks on a machine without accelerator need."""
    return {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port),
        "MASTER_ADDR": "127.0.0.1", "PYTHONUNBUFFERED": "1",
        "TORCH_EXTENSIONS_DIR": os.environ.get(
            "TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_extensions")
        ),
        **(extra or {}),
    }  # fmt: skip


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(process: subprocess.Popen[str]) -> None:
    """End a launch that is still running: politely, so that mpirun takes its ranks along."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def remove_shared_memory(port: int) -> None:
    """Remove the buffers that DeepSpeed's CPU communication leaves behind, told by their port."""
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        path.unlink(missing_ok=True)


def _become_rank(script: str, args: list[str]) -> None:
    variables = {
        "RANK": "OMPI_COMM_WORLD_RANK",
        "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
        "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    }
    for name, source in variables.items():
        os.environ[name] = os.environ[source]
    sys.argv = [script, *args]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    _become_rank(sys.argv[1], sys.argv[2:])
