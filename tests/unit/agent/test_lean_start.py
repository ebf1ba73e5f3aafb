"""The saver starts without what takes long to import: ranks wait for it as they begin."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "numpy", "deepspeed", "fsspec", "pydantic", "mpi4py")


def test_the_saver_starts_without_heavy_modules():
    program = "import sys, spotspeed.agent.server; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()
    assert sorted(set(HEAVY).intersection(loaded)) == []
