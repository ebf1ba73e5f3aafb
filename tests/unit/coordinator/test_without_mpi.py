"""The ranks find each other through the job's store wherever MPI cannot be asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT

CODE = """
import ctypes, sys
sys.modules["mpi4py"] = None
if sys.argv[1]:
    ctypes.CDLL(sys.argv[1])
from spotspeed.coordinator import rendezvous
assert rendezvous._is_libmpi_loaded() is bool(sys.argv[1])
rendezvous.default_store = lambda: object()
print(rendezvous.find_rendezvous(2).name)
"""
LIBRARY = Path(sys.prefix) / "lib" / "libmpi.so.40"


@pytest.mark.parametrize("library", ["", str(LIBRARY)], ids=["no libmpi", "libmpi in use"])
def test_under_mpirun_without_mpi4py_the_job_s_store_is_taken(library: str) -> None:
    if library and not LIBRARY.exists():
        pytest.skip("no libmpi in this environment")
    environ = {**os.environ, "OMPI_COMM_WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    told = subprocess.run(
        [sys.executable, "-c", CODE, library], env=environ, text=True, capture_output=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert "object" in told.stdout and "MPI" not in told.stdout
