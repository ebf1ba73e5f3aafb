"""Brings the hooks into the processes that this one starts through multiprocessing.

A child that is spawned, or comes from a fork server, has none of its parent's modules; scripts that
start their ranks with `torch.multiprocessing.spawn` or in a pool would train unhooked there.
"""

from __future__ import annotations

import importlib.util
import multiprocessing.process
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_KEY = "spotspeed"
_ROOT = "deepspeed"


def pass_on() -> None:
    """From now on, children of this process install the hooks when they import DeepSpeed.

    What a process hands to all its children is its `_config` (multiprocessing/process.py,
    BaseProcess.__init__); it is unpickled in the child before the child's own work is.
    """
    config: dict[str, Any] = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    config.setdefault(_KEY, _Legacy())


class _Legacy:
    """Acts by being unpickled in a child."""

    def __reduce__(self) -> tuple[Callable[[], _Legacy], tuple[()]]:
        return _receive, ()


def _receive() -> _Legacy:
    """In the child; what it returns is passed on to the child's own children."""
    if _ROOT in sys.modules:
        _install()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    return _Legacy()


def _install() -> None:
    from spotspeed.launch import install

    install()


class _Finder:
    """Waits for the import of DeepSpeed, finds it as everybody would, and installs the hooks."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _ROOT:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _install()

        loader.exec_module = exec_module
        return spec
