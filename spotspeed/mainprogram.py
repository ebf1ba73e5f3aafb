"""Runs a script, directory, archive or module as Python itself runs its main program.

What a program can see of how it was started is the same: `sys.argv`, `sys.path[0]` and the names of
`__main__` (CPython 3.11: Modules/main.c pymain_run_python, Python/pythonrun.c
_PyRun_SimpleFileObject). `__main__` stays in place when the program has ended, for threads, exit
handlers and the children that multiprocessing spawns.
"""

from __future__ import annotations

import builtins
import io
import os
import runpy
import sys
import zipfile
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType

_MAIN = "__main__"


def run_script(name: str, arguments: Sequence[str]) -> None:
    """As `python NAME ARGUMENT ...`; the name's links are followed for `sys.path[0]` alone."""
    sys.argv = [name, *arguments]
    file = name if os.path.isabs(name) else f"{os.getcwd()}/{name}"
    if os.path.isdir(file) or zipfile.is_zipfile(file):
        _put_first_path(file, is_safe=True)
        return _run_as_main(_MAIN, alter_argv=False)
    _put_first_path(os.path.dirname(os.path.realpath(file)))
    with io.open_code(file) as stream:
        code = compile(stream.read(), file, "exec", dont_inherit=True)
    module = _new_main()
    module.__file__ = file
    module.__loader__ = SourceFileLoader(_MAIN, file)
    vars(module)["__cached__"] = None
    exec(code, vars(module))


def run_module(name: str, arguments: Sequence[str]) -> None:
    """As `python -m NAME ARGUMENT ...`."""
    sys.argv = ["-m", *arguments]
    _put_first_path(os.getcwd())
    _run_as_main(name, alter_argv=True)


def _run_as_main(name: str, *, alter_argv: bool) -> None:
    """What Python calls for -m and for directories; it takes the names of `__main__` as it is."""
    _new_main()
    runpy._run_module_as_main(name, alter_argv=alter_argv)  # type: ignore[attr-defined]


def _new_main() -> ModuleType:
    module = ModuleType(_MAIN)
    module.__package__ = None
    vars(module).update(__builtins__=builtins, __annotations__={})
    sys.modules[_MAIN] = module
    return module


def _put_first_path(path: str, *, is_safe: bool = False) -> None:
    """Replace what -m has put there; with -P Python puts nothing there, but a directory to run."""
    if not sys.flags.safe_path:
        sys.path[0] = path
    elif is_safe:
        sys.path.insert(0, path)
