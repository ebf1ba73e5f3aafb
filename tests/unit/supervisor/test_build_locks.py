"""Locks of operator builds: which are left over, and which of those may be removed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spotspeed import build_locks
from spotspeed.build_locks import BuildLock, abandoned_locks, remove_dead

BUILD = """
import importlib.util, os, runpy, sys
torch = os.path.dirname(importlib.util.find_spec("torch").origin)
baton = runpy.run_path(torch + "/utils/file_baton.py")["FileBaton"](sys.argv[1])
print(baton.try_acquire(), flush=True)
input()
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a lock lies below TORCH_EXTENSIONS_DIR; it is made by the test."""
    monkeypatch.setattr(build_locks, "PAUSE_S", 0.0)
    folder = tmp_path / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    return folder / "lock"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"TORCH_EXTENSIONS_DIR": str(tmp_path)}


def test_a_lock_is_left_alone_while_its_builder_lives_and_removed_when_it_is_killed(
    lock: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_locks, "LOCAL", {build_locks.filesystem_of(str(lock))})
    words = [sys.executable, "-c", BUILD, str(lock)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as builder:
        assert builder.stdout is not None and builder.stdout.readline() == b"True\n"
        assert list(remove_dead(environ)) == [] and lock.exists()
        builder.kill()
    (line,) = remove_dead(environ)
    assert str(lock) in line and line.startswith("removed ") and not lock.exists()


def test_where_another_machine_may_build_an_old_lock_is_named_only(
    lock: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_locks, "LOCAL", frozenset())
    lock.touch()
    assert list(remove_dead(environ)) == [], "a build may be running"
    os.utime(lock, (1.0, 1.0))
    assert abandoned_locks(environ) == [BuildLock(str(lock), is_dead=False)]
    (line,) = remove_dead(environ)
    assert str(lock) in line and "remove it if no other machine" in line and lock.exists()


def test_without_extensions_there_is_nothing(tmp_path: Path) -> None:
    assert abandoned_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path / "none")}) == []
