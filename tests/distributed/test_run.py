"""`spotspeed.run` on real ranks: a script without a line of spotspeed gets the same."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path

import pytest

from tests.distributed.conftest import STAGES, References
from tests.distributed.job import (
    Job,
    Launcher,
    by_accelerate,
    by_deepspeed,
    by_mpirun,
    by_torchrun,
)
from tests.distributed.test_main_job import interrupt_and_resume

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(("stage", "launcher", "number"), [
    pytest.param(3, by_mpirun, signal.SIGUSR1, id="zero3-mpirun", marks=pytest.mark.full),
    pytest.param(0, by_deepspeed, signal.SIGTERM, id="zero0-deepspeed"),
    pytest.param(2, by_torchrun, signal.SIGTERM, id="zero2-torchrun", marks=pytest.mark.full),
    pytest.param(1, by_accelerate, signal.SIGUSR1, id="zero1-accelerate", marks=[
        pytest.mark.full,
        pytest.mark.skipif(importlib.util.find_spec("accelerate") is None,
                           reason="needs accelerate"),
    ]),
])  # fmt: skip
def test_a_script_without_a_line_of_spotspeed_is_interrupted_and_resumed_alike(
    stage: int, launcher: Launcher, number: signal.Signals, tmp_path: Path,
    plain_script: Path, references: References,
) -> None:  # fmt: skip
    job = Job(tmp_path / "job", stage, script=plain_script, is_plain=True)
    # Two launchers give 1 for whatever a rank ends with; `spotspeed supervise` sees through them.
    code = 1 if launcher in (by_torchrun, by_accelerate) else 75
    interrupt_and_resume(job, launcher, number, references, code)


def test_without_a_block_nothing_is_started_and_nothing_is_said(references: References) -> None:
    assert "spotspeed" not in references.output
    seen = references.process()
    assert not [name for name in seen["threads"] if "spotspeed" in name]
    assert "spotspeed" not in seen["excepthook"]
    for stage in STAGES:
        assert len(references.losses(stage)) == 40
