"""`attach(state=...)` on real ranks: what comes back, also when a notice was too quick."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.distributed.test_small_state import run_alone
from tests.ranks import run_ranks

DRIVER = "tests/distributed/drivers/late_state.py"

pytestmark = pytest.mark.ranks


def restored(output: str) -> dict[int, tuple[str, str]]:
    """What each rank printed of its two restores."""
    alone = dict(re.findall(r"rank (\d): engine alone: (.*)", output))
    whole = dict(re.findall(r"rank (\d): all: (.*)", output))
    return {int(rank): (alone[rank], whole[rank]) for rank in whole}


@pytest.mark.full
def test_a_step_that_had_not_ended_is_restored_by_the_engine_alone(tmp_path: Path) -> None:
    run_ranks(2, DRIVER, str(tmp_path), "notice", timeout_s=200, check=False)
    finished = run_ranks(2, DRIVER, str(tmp_path), "restore", timeout_s=200)
    assert restored(finished.output) == {
        0: ("step 3", "step 2, loop 2 of rank 0, data 2"),
        1: ("step 3", "step 2, loop 4 of rank 1, data 2"),
    }, finished.output
    assert "late: absent" in finished.output


@pytest.mark.full
def test_a_loop_that_says_that_its_step_has_ended_loses_nothing(tmp_path: Path) -> None:
    finished = run_ranks(2, DRIVER, str(tmp_path), "said", timeout_s=200, check=False)
    assert finished.returncode == 75, finished.output
    finished = run_ranks(2, DRIVER, str(tmp_path), "restore", timeout_s=200)
    assert restored(finished.output)[1] == ("step 3", "step 3, loop 6 of rank 1, data 3")


@pytest.mark.full
def test_another_number_of_ranks_gets_the_state_of_rank_0(tmp_path: Path) -> None:
    run_ranks(2, DRIVER, str(tmp_path / "two"), "train", timeout_s=200)
    shutil.copytree(tmp_path / "two", tmp_path / "copy")
    run_alone(DRIVER, str(tmp_path / "one"), "train")
    assert restored(run_alone(DRIVER, str(tmp_path / "copy"), "restore")) == {
        0: ("step 4", "step 4, loop 4 of rank 0, data 4")
    }
    finished = run_ranks(2, DRIVER, str(tmp_path / "one"), "restore", timeout_s=200)
    assert restored(finished.output)[1] == ("step 4", "step 4, loop 4 of rank 0, data 4")
