"""What the native control thread does while another thread keeps Python to itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from spotspeed.config import parse_block
from spotspeed.coordinator.bootstrap import bootstrap
from spotspeed.coordinator.coordinator import Coordinator, Cut, GateVerdict
from spotspeed.testing.network import DirectoryRendezvous

ROOT = Path(__file__).resolve().parents[3]
WAIT_S = 60.0
HOLDER = """
import ctypes, signal, sys
from pathlib import Path
from tests.unit.coordinator.test_native_control import rank_of

coordinator, saver = rank_of(1, Path(sys.argv[1]), ["SIGUSR1"])
# The signal goes to another thread, so that it does not end the read below.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
print("ready", flush=True)
# PyDLL keeps the GIL: until a byte comes, no Python runs in this process.
assert ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1) == 1
assert coordinator.gate(1).name == "LEAVE"
coordinator.close(20.0)
print(saver.heard, saver.steps, flush=True)
"""


class Saver:
    """Saves in no time."""

    def __init__(self) -> None:
        self.coordinator: Coordinator
        self.heard: list[str] = []
        self.steps: list[int] = []
        self.is_asked = threading.Event()

    def on_notice(self, source: str, seconds_left: float) -> None:
        self.heard.append(source)

    def on_agreed(self, cut: Cut) -> None: ...
    def on_capture(self, cut: Cut) -> None:
        self.steps.append(cut.step)
        self.is_asked.set()
        self.coordinator.report_durable(cut.round, "seal")

    def on_outcome(self, cut: Cut, digest: str | None, why: str) -> None: ...
    def on_peer_lost(self, rank: int, why: str) -> None: ...
    def leave(self, why: str) -> None: ...


def rank_of(rank: int, directory: Path, signals: list[str]) -> tuple[Coordinator, Saver]:
    """Rank `rank` of two, which meet in `directory`, at step 0."""
    transport = bootstrap(rank=rank, world_size=2, rendezvous=DirectoryRendezvous(directory))
    saver = Saver()
    block = parse_block({"path": "/unused", "notice": {"signals": signals}})
    saver.coordinator = Coordinator(transport, block, saver)
    saver.coordinator.start(0)
    saver.coordinator.exchange("ready", b"")
    return saver.coordinator, saver


def test_a_rank_whose_python_is_held_hears_a_signal_and_agrees(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], cwd=ROOT, env={**os.environ, "PYTHONPATH": "."},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdin is not None and holder.stdout is not None
    try:
        coordinator, saver = rank_of(0, tmp_path, [])
        assert holder.stdout.readline() == b"ready\n"
        holder.send_signal(signal.SIGUSR1)
        # Asked to capture: this rank knows the step, and so the other one has locked and answered.
        assert saver.is_asked.wait(WAIT_S)
        holder.stdin.write(b"x")
        holder.stdin.flush()
        assert coordinator.gate(1) is GateVerdict.LEAVE
        coordinator.close(20.0)
        assert holder.stdout.readline() == b"['SIGUSR1'] [0]\n"
        assert holder.wait(WAIT_S) == 0
    finally:
        holder.kill()
        holder.wait()
    assert saver.steps == [0] and saver.heard == []
