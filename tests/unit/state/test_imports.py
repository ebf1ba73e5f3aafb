"""Acting on modules that are imported later, or have been."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from spotspeed.state.imports import after_import


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"watched_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_actions_follow_the_import_in_their_order(module: str) -> None:
    seen: list[int] = []
    before = list(sys.meta_path)
    after_import(module, lambda found: seen.append(found.value))
    after_import(module, lambda found: setattr(found, "value", 2))
    after_import(module, lambda found: seen.append(found.value))
    assert module not in sys.modules and not seen
    assert importlib.import_module(module).value == 2
    assert seen == [1, 2] and sys.meta_path == before


def test_a_module_that_is_there_is_acted_on_at_once(module: str) -> None:
    importlib.import_module(module)
    seen: list[int] = []
    after_import(module, lambda found: seen.append(found.value))
    assert seen == [1]
