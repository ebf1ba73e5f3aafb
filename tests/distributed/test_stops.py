"""Interruptions at awkward places, of real jobs by real signals."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import spotspeed
from spotspeed.checkpoint.catalog import scan
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.staging.launch import saver_address
from spotspeed.storage import open_storage
from tests.ranks import (
    ROOT,
    free_port,
    launch_command,
    rank_environment,
    remove_shared_memory,
    run_ranks,
)

DRIVER = ROOT / "tests" / "distributed" / "drivers" / "stops.py"
LAUNCH_TIMEOUT_S = 180
SAVER_GONE_S = 30


@dataclass(frozen=True)
class Ended:
    """How one rank without a launcher ended."""

    returncode: int
    stderr: str
    at: float


def run_alone(ranks: int, case: str, folder: Path) -> list[Ended]:
    """The ranks as processes of nobody: nothing ends the others when one ends."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(
            [sys.executable, str(DRIVER), case, str(folder)], cwd=ROOT,
            env=rank_environment(port, place), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=(folder / f"stderr-{rank}").open("w"),
        ))  # fmt: skip
    ends: dict[int, float] = {}
    deadline = time.monotonic() + LAUNCH_TIMEOUT_S
    try:
        while len(ends) < ranks and time.monotonic() < deadline:
            for rank, process in enumerate(processes):
                if process.poll() is not None:
                    ends.setdefault(rank, time.monotonic())
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        remove_shared_memory(port)
    texts = [(folder / f"stderr-{rank}").read_text() for rank in range(ranks)]
    assert len(ends) == ranks, f"ranks {set(range(ranks)) - set(ends)} hang\n" + "\n".join(texts)
    return [Ended(process.returncode, texts[rank], ends[rank])
            for rank, process in enumerate(processes)]  # fmt: skip


def sealed(folder: Path):
    """What is sealed, newest first; every byte of it verified."""
    storage = open_storage(str(folder / "checkpoints"))
    catalog = scan(storage)
    assert catalog.damaged == ()
    for info in catalog.sealed:
        CheckpointReader.open(storage, info.directory).verify()
    return catalog


def test_two_notices_at_a_periodic_step_stop_once_with_that_save(tmp_path):
    finished = run_ranks(3, DRIVER, "grid", str(tmp_path), timeout_s=LAUNCH_TIMEOUT_S, check=False)
    assert finished.returncode == 75, finished.output[-6000:]
    assert finished.output.count("durable at step 5; leaving with 75") == 3, finished.output[-6000:]
    assert "were changed" not in finished.output, finished.output[-6000:]
    catalog = sealed(tmp_path)
    assert 1 in [info.step for info in catalog.sealed], "the save that was agreed on at the gate"
    assert [(i.step, i.reason) for i in catalog.sealed if i.step == 5] == [(5, "periodic")]
    assert any(i.step < 5 for i in catalog.sealed), "nothing of what was asked for twice"
    assert catalog.unsealed == ()


def test_a_notice_while_closing_ends_all_ranks_as_interrupted(tmp_path):
    finished = run_ranks(2, DRIVER, "closing", str(tmp_path), timeout_s=LAUNCH_TIMEOUT_S,
                         check=False)  # fmt: skip
    assert finished.returncode == 75, finished.output[-6000:]
    assert sealed(tmp_path).sealed[0].step == 3


def test_a_notice_while_the_script_ends_ends_all_ranks_as_interrupted(tmp_path):
    finished = run_ranks(2, DRIVER, "ending", str(tmp_path), timeout_s=LAUNCH_TIMEOUT_S,
                         check=False)  # fmt: skip
    assert finished.returncode == 75, finished.output[-6000:]
    assert sealed(tmp_path).sealed[0].step == 3


def test_a_notice_before_the_first_step_saves_the_state_that_the_run_begins_with(tmp_path):
    ended = run_alone(2, "starting", tmp_path)
    texts = "\n".join(rank.stderr for rank in ended)
    assert [rank.returncode for rank in ended] == [75, 75], texts
    assert texts.count("durable at step 0; leaving with 75") == 2, texts
    assert [(info.step, info.reason) for info in sealed(tmp_path).sealed] == [(0, "notice")]


@pytest.mark.full
def test_a_notice_before_a_restore_leaves_what_was_there(tmp_path):
    run_ranks(2, DRIVER, "resumed", str(tmp_path), timeout_s=LAUNCH_TIMEOUT_S)
    (before,) = sealed(tmp_path).sealed
    ended = run_alone(2, "starting", tmp_path)
    texts = "\n".join(rank.stderr for rank in ended)
    assert [rank.returncode for rank in ended] == [75, 75], texts
    assert texts.count(f"durable at step {before.step}; leaving with 75") == 2, texts
    assert sealed(tmp_path).sealed == (before,), texts
    run_ranks(2, DRIVER, "resumed", str(tmp_path), timeout_s=LAUNCH_TIMEOUT_S)
    assert (tmp_path / "restored-1.json").read_text() == str(before.step)


def test_a_killed_rank_ends_the_others_with_76_and_the_newest_tag(tmp_path):
    ended = run_alone(3, "killed", tmp_path)
    texts = "\n".join(rank.stderr for rank in ended)
    assert [rank.returncode for rank in ended] == [76, -9, 76], texts
    assert "nothing newer than 'good' (step 3) is known durable" in ended[0].stderr, texts
    assert "nothing newer than 'good' (step 3) is known durable" in ended[2].stderr, texts
    assert "rank 1 is lost, and its part of the state with it: fp32 of 0.weight" in texts
    assert max(rank.at for rank in ended) - ended[1].at < 20
    assert [info.tag for info in sealed(tmp_path).sealed] == ["good"]
    await_no_saver(tmp_path)


def test_survivors_save_what_replicas_cover_of_a_killed_rank_and_leave_with_75(tmp_path):
    ended = run_alone(3, "covered", tmp_path)
    texts = "\n".join(rank.stderr for rank in ended)
    assert [rank.returncode for rank in ended] == [75, -9, 75], texts
    (newest,) = sealed(tmp_path).sealed
    assert (newest.step, newest.world_size) == (5, 2), texts
    found = spotspeed.open_checkpoint(str(tmp_path / "checkpoints"))
    stored = [found.read(name, "fp32").ravel() for name in found.parameters()]
    assert sum(map(len, stored)) == (16 + 1) * 16 + 17
    expected = torch.load(tmp_path / "masters.pt", weights_only=True).numpy()
    assert np.array_equal(np.sort(np.concatenate(stored)), np.sort(expected))
    run_ranks(2, DRIVER, "resumed", str(tmp_path), timeout_s=LAUNCH_TIMEOUT_S)
    assert (tmp_path / "restored-1.json").read_text() == "5"


@pytest.mark.full
def test_under_an_mpirun_that_lets_survivors_live_they_save_what_replicas_cover(tmp_path):
    port = free_port()
    command = launch_command(3, DRIVER, "covered", str(tmp_path))
    command.insert(1, "--enable-recovery")
    finished = subprocess.run(command, cwd=ROOT, env=rank_environment(port, None),
                              capture_output=True, text=True, timeout=LAUNCH_TIMEOUT_S)  # fmt: skip
    remove_shared_memory(port)
    assert finished.stderr.count("durable at step 5; leaving with 75") == 2, finished.stderr[-6000:]
    (newest,) = sealed(tmp_path).sealed
    assert (newest.step, newest.world_size) == (5, 2)


def test_an_error_in_one_rank_ends_the_others_with_76(tmp_path):
    ended = run_alone(3, "failing", tmp_path)
    texts = "\n".join(rank.stderr for rank in ended)
    assert [rank.returncode for rank in ended] == [76, 1, 76], texts
    assert "a mistake of the training script" in ended[1].stderr
    assert max(rank.at for rank in ended) - ended[1].at < 20
    assert [info.tag for info in sealed(tmp_path).sealed] == ["good"]
    await_no_saver(tmp_path)


@pytest.mark.parametrize(
    ("case", "codes", "why"),
    [
        ("exiting", [76, 75], "4 forwards of the training begun, 3 by rank 1"),
        ("raising", [76, 75], "rank 0: waiting: in "),
        pytest.param("returning", [76, 76], "blocked: 4 forwards", marks=pytest.mark.full),
        pytest.param("handled", [76, 76], "update 4 has begun here", marks=pytest.mark.full),
        pytest.param("finally_closing", [76, 1], "rank 0: waiting: in ", marks=pytest.mark.full),
    ],
)
def test_any_end_of_one_rank_alone_ends_the_others_with_76(case, codes, why, tmp_path):
    ended = run_alone(2, case, tmp_path)
    texts = "\n".join(rank.stderr for rank in ended)
    assert [rank.returncode for rank in ended] == codes, texts
    assert why in ended[1].stderr, texts
    after_s = ended[0].at + time.time() - time.monotonic() - float((tmp_path / "ended").read_text())
    assert after_s < 20, texts
    assert sealed(tmp_path).sealed == (), "of a step that one rank has left in the middle"


@pytest.mark.full
def test_a_rank_that_goes_on_using_the_model_alone_is_waited_for(tmp_path):
    ended = run_alone(2, "generating", tmp_path)
    texts = "\n".join(rank.stderr for rank in ended)
    assert [rank.returncode for rank in ended] == [0, 0], texts
    assert [info.step for info in sealed(tmp_path).sealed] == [3], texts


def await_no_saver(folder: Path) -> None:
    """Nobody listens at the store's socket any more, soon."""
    storage = open_storage(str(folder / "checkpoints"))
    name = "@" + saver_address(storage.url).removeprefix("\0")
    deadline = time.monotonic() + SAVER_GONE_S
    while any(line.endswith(name) for line in Path("/proc/net/unix").read_text().splitlines()):
        assert time.monotonic() < deadline, f"a saver still listens at {name}, {os.getpid()}"
        time.sleep(0.1)
