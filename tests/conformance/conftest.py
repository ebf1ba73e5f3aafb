"""Servers that the conformance suites share: each is started when the first test asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.object_stores import ObjectStore, serve


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], ObjectStore]]:
    """The object-store server of a kind (tests.object_stores.KINDS), or a skip with the reason."""
    running: dict[str, ObjectStore] = {}
    with contextlib.ExitStack() as stack:

        def running_or_new(kind: str) -> ObjectStore:
            if kind not in running:
                folder = tmp_path_factory.mktemp(kind) / "server"
                running[kind] = stack.enter_context(serve(kind, folder))
            return running[kind]

        yield running_or_new
