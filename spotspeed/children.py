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

_ROOT = "deepspeed"


def pass_on() -> None:
    """From now on, children of this process install the hooks when they import DeepSpeed."""
    pass_on_as("spotspeed", _Hooks())


def pass_on_as(name: str, legacy: Any) -> None:
    """Hand `legacy` to all children of this process, under a name; a second one replaces it.

    What a process hands to all its children is its `_config` (multiprocessing/process.py,
    BaseProcess.__init__); it is unpickled in the child before the child's own work is.
    """
    config: dict[str, Any] = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    config[name] = legacy


def when_imported(action: Callable[[], None]) -> None:
    """Call `action` once DeepSpeed has been imported: now, if it has been."""
    if _ROOT in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Finder(action))


class _Hooks:
    """Acts by being unpickled in a child."""

    def __reduce__(self) -> tuple[Callable[[], _Hooks], tuple[()]]:
        return _receive, ()


def _receive() -> _Hooks:
    """In the child; what it returns is passed on to the child's own children."""
    when_imported(_install)
    return _Hooks()


def _install() -> None:
    from spotspeed.launch import install

    install()


class _Finder:
    """Finds DeepSpeed as everybody would, and acts when its import is complete."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

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
            self._action()

        loader.exec_module = exec_module
        return spec
