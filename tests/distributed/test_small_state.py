"""A resumed run is the uninterrupted one bit for bit: dropout, schedule, scale, buffers, data."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.ranks import ROOT, free_port, rank_environment, remove_shared_memory, run_ranks

DRIVER = "tests/distributed/drivers/small_resume.py"
CASES = ("zero0", "zero0-bf16", "zero1", "zero1-batchnorm", "zero1-bf16-optimizer",
         "zero2-checkpointing", "zero2-fp16", "zero3", "zero3-fp16")  # fmt: skip


def lines(output, rank):
    return [line.split()[2] for line in output.splitlines() if line.startswith(f"rank {rank}: ")]


def run_alone(driver, *arguments):
    """What one process, that is its own launcher, writes; fails when it does."""
    port = free_port()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**rank_environment(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
           "PYTHONPATH": path}  # fmt: skip
    try:
        done = subprocess.run([sys.executable, driver, *arguments], cwd=ROOT, env=env, timeout=300,
                              capture_output=True, text=True)  # fmt: skip
    finally:
        remove_shared_memory(port)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_one_process_resumes_bit_for_bit_at_every_stage():
    output = run_alone(DRIVER, *CASES)
    assert lines(output, 0) == [f"{name}:" for name in CASES]


def test_the_hooks_fire_at_the_boundaries_of_real_engines_and_epochs_resume_exactly():
    output = run_alone("tests/distributed/drivers/boundary_real.py")
    names = ("engine", "overflow", "pipeline", "epochs", "batches",
             "a_load_among_batches")  # fmt: skip
    assert lines(output, 0) == [f"check_{name}:" for name in names]


@pytest.mark.ranks
def test_two_ranks_resume_bit_for_bit():
    cases = ("zero1", "zero1-batchnorm", "zero2-checkpointing", "zero2-fp16", "zero3")
    finished = run_ranks(2, DRIVER, *cases, timeout_s=240)
    for rank in range(2):
        assert lines(finished.output, rank) == [f"{name}:" for name in cases]
