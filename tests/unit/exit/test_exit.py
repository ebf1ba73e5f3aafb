"""What the watch over the main thread is told, and the code that a process ends with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT

SCRIPT = """
import sys

from spotspeed import errors
from spotspeed.exit import ExitWatch, watch_refusals

def tell(error):
    print("told", type(error).__name__, getattr(error, "code", None), flush=True)

def caught():
    try:
        sys.exit(2)
    except SystemExit:
        pass

def in_the_wake(first):
    try:
        raise first
    finally:
        raise errors.PeerLostError("another rank")

watch_refusals()
watch = ExitWatch(tell)
{ending}
"""


def run(folder: Path, ending: str, *, is_module: bool = False) -> tuple[str, int]:
    """(what `close` was told, exit code) of a script that ends so."""
    script = folder / "ending.py"
    script.write_text(SCRIPT.replace("{ending}", ending))
    where = ["-m", script.stem] if is_module else [str(script)]
    done = subprocess.run(
        [sys.executable, *where], cwd=folder, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""}, timeout=60,
    )  # fmt: skip
    return done.stdout.strip(), done.returncode


@pytest.mark.parametrize(
    ("ending", "told", "code"),
    [
        ("pass", "told NoneType None", 0),
        ("caught()", "told NoneType None", 0),
        ("sys.exit(0)", "told SystemExit 0", 0),
        ("sys.exit(75)", "told SystemExit 75", 75),
        ("raise SystemExit(75)", "told UnknownExit None", 75),
        ("try:\n    raise SystemExit(75)\nfinally:\n    pass", "told UnknownExit None", 75),
        ("raise ValueError", "told ValueError None", 1),
    ],
)
def test_the_end_of_the_main_thread_is_told_as_it_was(
    tmp_path: Path, ending: str, told: str, code: int
) -> None:
    assert run(tmp_path, ending) == (told, code)


def test_the_end_of_a_module_that_is_run_is_told_as_well(tmp_path: Path) -> None:
    assert run(tmp_path, "pass", is_module=True) == ("told NoneType None", 0)
    assert run(tmp_path, "quit(3)", is_module=True) == ("told UnknownExit None", 3)


@pytest.mark.parametrize(
    ("first", "code"), [("KeyError()", 1), ("RuntimeError()", 76), ("errors.StorageError()", 76)]
)
def test_an_error_of_the_script_is_not_hidden_by_ours_that_it_leads_to(
    tmp_path: Path, first: str, code: int
) -> None:
    assert run(tmp_path, f"in_the_wake({first})")[1] == code
    assert run(tmp_path, f"watch.disarm()\nin_the_wake({first})")[1] == code
