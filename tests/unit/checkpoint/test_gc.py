"""Removal on a real store: what goes, in which order, and what a crash between leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spotspeed.checkpoint.catalog import find, list_sealed, scan
from spotspeed.checkpoint.commit import roll_forward
from spotspeed.checkpoint.gc import collect
from spotspeed.checkpoint.ownership import epoch_key, record_restored_from
from spotspeed.core.manifest import Ticket
from spotspeed.core.retention import Keep
from spotspeed.errors import OwnedError
from spotspeed.storage.contract import Storage
from spotspeed.storage.local import LocalStorage

Save = Callable[..., Ticket]


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


class TracingStorage:
    """Notes every removal, and can die after so many of them."""

    def __init__(self, inner: Storage, survive: int = 1_000) -> None:
        self._inner = inner
        self.removed: list[str] = []
        self._left = survive

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def delete(self, key: str) -> None:
        self._live(key)
        self._inner.delete(key)

    def delete_prefix(self, prefix: str) -> None:
        self._live(prefix)
        self._inner.delete_prefix(prefix)

    def _live(self, name: str) -> None:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        self.removed.append(name)


def test_the_manifest_goes_before_the_data(storage: LocalStorage, seal_small: Save) -> None:
    tickets = [seal_small(storage, 1, step) for step in (10, 20, 30)]
    tracing = TracingStorage(storage)
    outcome = collect(tracing, Keep(last=2), epoch=1)
    assert tracing.removed == [tickets[0].manifest_path, tickets[0].directory]
    assert [removal.directory for removal in outcome.removals] == [tickets[0].directory]
    assert outcome.size_bytes > 0
    assert storage.list(tickets[0].directory) == []
    assert [info.step for info in list_sealed(storage)] == [30, 20]


def test_a_dry_run_says_the_same_and_removes_nothing(
    storage: LocalStorage, seal_small: Save
) -> None:
    for step in (10, 20, 30):
        seal_small(storage, 1, step)
    before = storage.list()
    planned = collect(storage, Keep(last=1), epoch=1, dry_run=True)
    assert storage.list() == before
    assert collect(storage, Keep(last=1), epoch=1) == planned
    assert collect(storage, Keep(last=1), epoch=1).removals == ()


def test_a_crash_between_the_steps_leaves_no_torn_checkpoint(
    storage: LocalStorage, seal_small: Save
) -> None:
    for step in (10, 20, 30):
        seal_small(storage, 1, step)
    for survive in range(4):
        with contextlib.suppress(KeyboardInterrupt):
            collect(TracingStorage(storage, survive), Keep(last=1), epoch=1)
        for info in list_sealed(storage):
            assert len(storage.list(info.directory)) == 5
        assert find(storage).step == 30
    collect(storage, Keep(last=1), epoch=1)
    assert [info.step for info in list_sealed(storage)] == [30]


def test_a_half_removed_checkpoint_does_not_come_back_torn(
    storage: LocalStorage, seal_small: Save
) -> None:
    gone = seal_small(storage, 1, 10)
    seal_small(storage, 1, 20)
    storage.delete(gone.manifest_path)
    storage.delete(gone.shard_path(0))
    assert roll_forward(storage).sealed == ()
    assert [info.step for info in list_sealed(storage)] == [20]


def test_leftovers_and_lost_branches_go_after_the_first_seal(
    storage: LocalStorage, seal_small: Save, save_small: Save
) -> None:
    origin = seal_small(storage, 1, 10)
    lost = seal_small(storage, 1, 20)
    explicit = seal_small(storage, 1, 25, reason="explicit")
    torn = save_small(storage, 1, 30, ranks=[0])
    storage.put(epoch_key(2), b"claimed")
    record_restored_from(storage, 2, origin.directory)
    flying = save_small(storage, 2, 11, ranks=[1])
    assert collect(storage, Keep(last=3), epoch=2).removals == ()
    seal_small(storage, 2, 12)
    outcome = collect(storage, Keep(last=3), epoch=2)
    assert {removal.directory for removal in outcome.removals} == {lost.directory, torn.directory}
    assert scan(storage).unsealed == (flying.directory,)
    assert find(storage, "global_step25").directory == explicit.directory


def test_nothing_is_removed_for_an_epoch_that_is_over(
    storage: LocalStorage, seal_small: Save
) -> None:
    for step in (10, 20, 30):
        seal_small(storage, 1, step)
    storage.put(epoch_key(2), b"claimed")
    with pytest.raises(OwnedError, match="epoch 2"):
        collect(storage, Keep(last=1), epoch=1)
    assert len(list_sealed(storage)) == 3


def test_what_is_not_ours_is_left_alone(storage: LocalStorage, seal_small: Save) -> None:
    storage.put("global_step10/latest", b"marker")
    storage.put("notes.txt", b"mine")
    broken = seal_small(storage, 1, 5)
    storage.put(broken.manifest_path, b"damaged")
    for step in (10, 20):
        seal_small(storage, 1, step)
    collect(storage, Keep(last=1), epoch=1)
    assert storage.get("global_step10/latest", 10) == b"marker"
    assert storage.get("notes.txt", 10) == b"mine"
    assert storage.get(broken.manifest_path, 10) == b"damaged"
