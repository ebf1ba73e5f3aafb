"""A process whose threads are in native calls ends as its script says."""

from __future__ import annotations

import subprocess
import sys

import pytest

START = """
import sys, threading
from spotspeed.staging.native import Arena, CopyEngine, split_planes

arena, engine = Arena.create(1 << 20), CopyEngine(2)
source, target = bytearray(1 << 16), bytearray(1 << 16)
begun = threading.Event()

def call():
    while True:
        {call}
        begun.set()

for _ in range(4):
    threading.Thread(target=call, daemon=True).start()
begun.wait()
"""
CALLS = {
    "prefault": "arena.prefault(0, 1 << 16)",
    "copy": "engine.copy([(arena.address, arena.address + (1 << 16), 1 << 16)])",
    "planes": "split_planes(source, target, 4)",
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("end, code", [("", 0), ("sys.exit(3)", 3), ("raise KeyError(1)", 1)])
def test_daemon_threads_in_native_calls_do_not_abort_the_process(
    call: str, end: str, code: int
) -> None:
    script = START.format(call=call) + end
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, "terminate called" in ended.stderr) == (code, False), ended.stderr
