"""A pytest plugin: every DeepSpeed config of the session gets a "spotspeed" block.

    python -m pytest -p tests.deepspeed_suite.plugin --spotspeed DIRECTORY ...

Each test has a path of its own below DIRECTORY (with --one-path, all have one), which its fixtures
and all its processes share. The processes of DeepSpeed's own tests come from a fork server and
import no conftest: they are reached as spotspeed reaches the children of any script.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import pytest

import spotspeed
from spotspeed import children

_NAME = "spotspeed-suite"
_ENDLESS = "test_elastic_checkpoint_change_dp"
"""Expects that another number of ranks is refused. Where it is not, pytest's failure ends workers
of the pool instead of their test, and DeepSpeed's runner waits until it gives up the session."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--spotspeed", metavar="DIRECTORY", help="where the blocks' paths are")
    parser.addoption("--one-path", action="store_true", help="all tests have one path")


def pytest_configure(config: pytest.Config) -> None:
    root = config.getoption("--spotspeed")
    if root:
        spotspeed.install()
        _Injection(os.path.abspath(root), "all" if config.getoption("--one-path") else None).apply()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--spotspeed"):
        for item in items:
            if _ENDLESS in item.name:
                item.add_marker(pytest.mark.skip(reason="another number of ranks may load"))


class _Injection:
    """Acts by being unpickled in a child, with the name of the test that runs then."""

    def __init__(self, root: str, test: str | None = None) -> None:
        self.root, self.test = root, test

    def __reduce__(self) -> tuple[Callable[..., _Injection], tuple[str, str]]:
        return _receive, (self.root, self.current())

    def current(self) -> str:
        """The running test, without the phase that pytest adds."""
        running = os.environ.get("PYTEST_CURRENT_TEST", "none").rpartition(" ")[0]
        return running if self.test is None else self.test

    def block(self) -> dict[str, Any]:
        name = hashlib.sha256(self.current().encode()).hexdigest()[:16]
        return {"path": f"{self.root}/{name}"}

    def apply(self) -> None:
        """Here, and in every child from now on."""
        children.pass_on_as(_NAME, self)
        children.when_imported(self._wrap)

    def _wrap(self) -> None:
        from deepspeed.runtime.config import DeepSpeedConfig

        original = DeepSpeedConfig.__init__

        @functools.wraps(original)
        def __init__(config: Any, source: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(source, str | os.PathLike) and os.path.exists(source):
                with open(source) as file:
                    source = json.load(file)
            if isinstance(source, dict):
                source = source | {"spotspeed": self.block()}
            original(config, source, *args, **kwargs)

        DeepSpeedConfig.__init__ = __init__


def _receive(root: str, test: str) -> _Injection:
    injection = _Injection(root, test)
    injection.apply()
    return injection
