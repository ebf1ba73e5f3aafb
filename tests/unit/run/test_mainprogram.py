"""A program started through spotspeed sees what it sees when Python starts it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from spotspeed.run import main
from tests.ranks import ROOT

PROBE = '''
"""What a program knows of its start."""
import multiprocessing, json, sys, threading, __main__

class Pickled:
    pass

def told():
    spec = __spec__ and [__spec__.name, __spec__.origin, __spec__.parent]
    return {
        "argv": sys.argv, "path": sys.path[0], "file": __file__, "package": __package__,
        "loader": [type(__loader__).__name__, getattr(__loader__, "name", None)], "spec": spec,
        "cached": globals().get("__cached__"), "doc": __doc__, "name": __name__,
        "names": sorted(name for name in globals() if name.startswith("__")),
        "builtins": type(__builtins__).__name__, "orig": sys.orig_argv[:1],
        "code": told.__code__.co_filename, "flags": told.__code__.co_flags,
        "annotations": globals().get("__annotations__"), "main": vars(__main__) is globals(),
    }

def child(queue):
    found = {**told(), "pickled": Pickled}
    del found["orig"]
    queue.put({key: str(value) for key, value in found.items()})

def spawned():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    found = queue.get(timeout=20)
    process.join()
    return found

def late():
    threading.main_thread().join()
    print(json.dumps(sys.modules["__main__"].__name__))

if __name__ == "__main__":
    print(json.dumps([told(), spawned() if "--spawn" in sys.argv else None]))
    threading.Thread(target=late).start()
'''
THROUGH = ("import sys; sys.argv[1] == '-m' and sys.argv.pop(1); from spotspeed import mainprogram;"
           "mainprogram.run_{}(sys.argv[1], sys.argv[2:])")  # fmt: skip


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    for folder in ("real", "link", "pkg/sub", "directory"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "real" / "probe.py").write_text(PROBE)
    (tmp_path / "link" / "probe.py").symlink_to("../real/probe.py")
    for copy in ("pkg/__main__.py", "pkg/sub/mod.py", "directory/__main__.py"):
        shutil.copy(tmp_path / "real" / "probe.py", tmp_path / copy)
    for package in ("pkg", "pkg/sub"):
        (tmp_path / package / "__init__.py").touch()
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.write(tmp_path / "real" / "probe.py", "__main__.py")
    return tmp_path


def outcome(words: list[str], folder: Path) -> list[Any]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=env, timeout=30,
                          capture_output=True, text=True, check=True)  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("words", [
    ["real/probe.py"], ["link/probe.py", "--spawn", "x"], ["./link/../real/probe.py"],
    ["{folder}/link/probe.py", "-m"], ["-m", "pkg.sub.mod", "x"], ["-m", "pkg"], ["directory", "a"],
    ["archive.zip"],
], ids=" ".join)  # fmt: skip
def test_it_runs_as_python_runs_it(words: list[str], programs: Path) -> None:
    words = [word.format(folder=programs) for word in words]
    kind = "module" if words[0] == "-m" else "script"
    expected = outcome(words, programs)
    assert outcome(["-c", THROUGH.format(kind), *words], programs) == expected
    assert len(expected) == 2 and expected[0][0]["main"] is True


def test_what_is_not_there_is_said_as_python_says_it(programs: Path) -> None:
    def said(words: list[str]) -> tuple[int, str]:
        done = subprocess.run([sys.executable, *words], cwd=programs, capture_output=True,
                              text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
        return done.returncode, done.stderr

    words = ["-m", "pkg.missing"]
    assert said(["-c", THROUGH.format("module"), *words]) == said(words)


@pytest.mark.full
def test_the_hooks_leave_the_program_as_it_is(programs: Path) -> None:
    words = ["link/probe.py", "--an", "argument", "--spawn"]
    through = outcome(["-m", "spotspeed.run", "--local_rank=0", *words], programs)
    expected = outcome([words[0], "--local_rank=0", *words[1:]], programs)
    assert through == expected


def test_without_a_script_it_says_how_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--local_rank=0"])
    assert ended.value.code == 2 and "needs a script" in capsys.readouterr().err
