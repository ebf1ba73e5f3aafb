"""Acts on a module once it has been imported: at once if it has been, else when somebody does."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

Action = Callable[[ModuleType], None]


def after_import(name: str, action: Action) -> None:
    """Call `action` with module `name` after it has been executed; nothing is imported for that.

    Whoever imports the module finds it as `action` left it. A second action on the same module is
    called after the first.
    """
    module = sys.modules.get(name)
    watching = [finder for finder in sys.meta_path if isinstance(finder, _Watch)]
    if module is not None and not any(finder.name == name for finder in watching):
        action(module)
        return
    for finder in watching:
        if finder.name == name:
            finder.actions.append(action)
            return
    sys.meta_path.insert(0, _Watch(name, action))


class _Watch:
    """A finder that waits for one module, acts on it and is gone."""

    def __init__(self, name: str, action: Action) -> None:
        self.name, self.actions = name, [action]

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, with the actions after its execution; None for all others."""
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for action in self.actions:
                    action(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
