"""The saver outlives what launchers do to the ranks of a node, with everything they staged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.saver_ranks import DRIVER, LIMIT_S, check_sealed, wait_gone
from tests.ranks import ROOT, free_port, launch_command, rank_environment

RANKS = 2


def _mpirun(port: int) -> list[str]:
    return launch_command(RANKS, DRIVER)


def _torchrun(port: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS),
            "--master_port", str(port), str(DRIVER)]  # fmt: skip


def _deepspeed(port: int) -> list[str]:
    program = Path(sys.executable).with_name("deepspeed")
    return [str(program), "--num_gpus", str(RANKS), "--master_port", str(port), str(DRIVER)]


@pytest.mark.ranks
@pytest.mark.parametrize("launcher", [_mpirun, _torchrun, _deepspeed])
def test_the_saver_finishes_what_a_launcher_cut_short(
    launcher: Callable[[int], list[str]], tmp_path: Path
) -> None:
    path, meeting, port = tmp_path / "store", tmp_path / "meeting", free_port()
    meeting.mkdir()
    command = [*launcher(port), str(path), "--hang", str(meeting)]
    environment = rank_environment(port, {"PYTHONPATH": str(ROOT)})
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    saver = 0
    try:
        ranks, saver = _wait_staged(meeting, process, tmp_path / "log")
        assert not list(path.glob("*/*.receipt"))
        victim = _child(process.pid) if launcher is _deepspeed else process.pid
        os.kill(victim, signal.SIGTERM)
        process.wait(LIMIT_S)
        for rank in ranks:
            wait_gone(rank)
        assert _is_stopped(saver), "the saver was not touched"
        os.kill(saver, signal.SIGCONT)
        wait_gone(saver)
    finally:
        if process.poll() is None:
            process.kill()
        if saver and Path(f"/proc/{saver}").exists():
            os.kill(saver, signal.SIGCONT)
    check_sealed(path, 5, world_size=RANKS, count=4, elements=1 << 16)


def _wait_staged(
    meeting: Path, process: subprocess.Popen[bytes], log: Path
) -> tuple[list[int], int]:
    """Process ids of the ranks, and of their common saver, once all have staged."""
    deadline = time.monotonic() + 2 * LIMIT_S
    while len(found := list(meeting.glob("staged-*"))) < RANKS:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)
    pairs = [tuple(map(int, file.read_text().split())) for file in found]
    savers = {saver for _, saver in pairs}
    assert len(savers) == 1
    return [rank for rank, _ in pairs], savers.pop()


def _child(pid: int) -> int:
    """The launcher's own child: `deepspeed` forwards nothing to it."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
