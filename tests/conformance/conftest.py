"""Servers that the conformance suites share: each is started when the first test asks for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest

from tests.object_stores import ObjectStore, serve

Servers = Callable[[str], ObjectStore]


@pytest.fixture(scope="package")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """The server of a kind (tests.object_stores.KINDS), started by the first who asks."""
    stores: dict[str, ObjectStore] = {}
    with contextlib.ExitStack() as stack:

        def running_or_new(kind: str) -> ObjectStore:
            if kind not in stores:
                before = dict(os.environ)
                folder = tmp_path_factory.mktemp(kind) / "server"
                stores[kind] = stack.enter_context(serve(kind, folder))
                # It outlives this test, and others are not to find a cloud in their environment.
                for name in stores[kind].environment.keys() - before.keys():
                    del os.environ[name]
                os.environ.update(before)
            return stores[kind]

        yield running_or_new


@pytest.fixture
def servers(running: Servers, monkeypatch: pytest.MonkeyPatch) -> Servers:
    """As `running`, with the environment of this test pointing there; or a skip with the reason."""

    def visited(kind: str) -> ObjectStore:
        store = running(kind)
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        return store

    return visited
