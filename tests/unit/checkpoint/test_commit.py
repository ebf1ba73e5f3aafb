"""Sealing: by whoever comes last, as often as anyone likes, and never over a contradiction."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spotspeed.checkpoint.commit import (
    LATEST_KEY,
    read_latest,
    roll_forward,
    take_back,
    try_seal,
    withdraw,
)
from spotspeed.core.manifest import Ticket
from spotspeed.errors import CorruptionError, FormatError, StorageError
from spotspeed.storage.contract import ReadBuffer
from spotspeed.storage.local import LocalStorage
from spotspeed.storage.memory import MemoryStorage

Save = Callable[..., Ticket]


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


def test_the_last_receipt_seals(storage: LocalStorage, save_small: Save) -> None:
    ticket = save_small(storage, 1, 10, ranks=[0])
    assert try_seal(storage, ticket) is None
    save_small(storage, 1, 10, ranks=[1])
    manifest = try_seal(storage, ticket)
    assert manifest is not None and manifest.ticket == ticket
    assert read_latest(storage) == (ticket.directory, manifest.digest)


def test_sealing_again_changes_nothing(storage: LocalStorage, save_small: Save) -> None:
    ticket = save_small(storage, 1, 10)
    first = try_seal(storage, ticket)
    stored = storage.get(ticket.manifest_path, 1 << 20)
    assert try_seal(storage, ticket) == first
    assert storage.get(ticket.manifest_path, 1 << 20) == stored


def test_all_ranks_may_seal_at_once(storage: LocalStorage, save_small: Save) -> None:
    ticket = save_small(storage, 1, 10, world_size=4)
    with ThreadPoolExecutor(8) as pool:
        manifests = list(pool.map(lambda _: try_seal(storage, ticket), range(16)))
    assert len({m.digest for m in manifests if m is not None}) == 1
    assert None not in manifests


def test_a_manifest_that_does_not_follow_from_the_receipts_is_an_error(
    storage: LocalStorage, save_small: Save
) -> None:
    ticket = save_small(storage, 1, 10)
    storage.put(ticket.manifest_path, b"{}")
    with pytest.raises(CorruptionError, match=r"manifest\.json"):
        try_seal(storage, ticket)
    assert storage.get(ticket.manifest_path, 1 << 20) == b"{}"


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_shard_that_is_not_what_its_receipt_says_prevents_the_seal(
    storage: LocalStorage, save_small: Save, damage: str
) -> None:
    ticket = save_small(storage, 1, 10)
    if damage == "missing":
        storage.delete(ticket.shard_path(1))
    else:
        storage.put(ticket.shard_path(1), b"cut short")
    with pytest.raises(FormatError, match=r"rank-00001\.shard"):
        try_seal(storage, ticket)


def test_a_receipt_of_another_save_prevents_the_seal(
    storage: LocalStorage, save_small: Save
) -> None:
    ticket = save_small(storage, 1, 10)
    other = save_small(storage, 1, 20)
    storage.put(ticket.receipt_path(1), storage.get(other.receipt_path(1), 1 << 20))
    with pytest.raises(FormatError, match="rank-00001"):
        try_seal(storage, ticket)


def test_latest_moves_forward_only(storage: LocalStorage, save_small: Save) -> None:
    older, newer = save_small(storage, 1, 10), save_small(storage, 1, 20)
    try_seal(storage, newer)
    try_seal(storage, older)
    hint = read_latest(storage)
    assert hint is not None and hint[0] == newer.directory


def test_latest_follows_a_restart_below_the_lost_step(
    storage: LocalStorage, seal_small: Save
) -> None:
    seal_small(storage, 1, 100)
    ticket = seal_small(storage, 2, 61)
    hint = read_latest(storage)
    assert hint is not None and hint[0] == ticket.directory


def test_latest_leaves_a_checkpoint_that_is_gone(storage: LocalStorage, seal_small: Save) -> None:
    gone = seal_small(storage, 1, 100)
    storage.delete_prefix(gone.directory)
    ticket = seal_small(storage, 1, 50)
    hint = read_latest(storage)
    assert hint is not None and hint[0] == ticket.directory


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"[]", b"{}", b'{"directory": "../x", "digest": "0"}',
             b'{"directory": 7, "digest": "0"}', b"[" * 60_000],
)  # fmt: skip
def test_a_damaged_hint_is_no_hint_and_is_replaced(
    storage: LocalStorage, seal_small: Save, data: bytes
) -> None:
    storage.put(LATEST_KEY, data)
    assert read_latest(storage) is None
    ticket = seal_small(storage, 1, 10)
    hint = read_latest(storage)
    assert hint is not None and hint[0] == ticket.directory


def test_a_hint_that_cannot_be_written_does_not_deny_the_seal(save_small: Save) -> None:
    class NoHint(MemoryStorage):
        def put(self, key: str, data: ReadBuffer) -> None:
            if key == LATEST_KEY:
                raise StorageError("the quota is used up")
            super().put(key, data)

    storage = NoHint()
    assert try_seal(storage, save_small(storage, 1, 10)) is not None


def test_roll_forward_seals_what_is_complete_and_reports_the_rest(
    storage: LocalStorage, save_small: Save, seal_small: Save
) -> None:
    seal_small(storage, 1, 10)
    complete = save_small(storage, 1, 20)
    torn = save_small(storage, 1, 30, ranks=[1])
    broken = save_small(storage, 1, 40)
    storage.put(broken.receipt_path(0), b"\0" * 200)
    empty = save_small(storage, 1, 50, ranks=[0])
    storage.delete(empty.receipt_path(0))
    storage.put("global_step7/latest", b"not ours")
    outcome = roll_forward(storage)
    assert [manifest.ticket for manifest in outcome.sealed] == [complete]
    causes = {item.directory: item.cause for item in outcome.unsealed}
    assert set(causes) == {torn.directory, broken.directory, empty.directory}
    assert "receipt" in causes[broken.directory]
    assert roll_forward(storage).sealed == ()


def test_roll_forward_of_an_empty_path_does_nothing(storage: LocalStorage) -> None:
    assert roll_forward(storage).sealed == ()


def test_a_part_of_a_lost_save_is_taken_back(storage: LocalStorage, save_small: Save) -> None:
    ticket = save_small(storage, 1, 10, ranks=[0, 1], world_size=3)
    assert take_back(storage, ticket, 0) is None
    assert [info.key for info in storage.list()] == [ticket.receipt_path(1), ticket.shard_path(1)]
    assert take_back(storage, ticket, 1) is take_back(storage, ticket, 2) is None
    assert storage.list() == []


def test_what_is_complete_after_all_is_sealed_and_not_taken_back(
    storage: LocalStorage, save_small: Save
) -> None:
    ticket = save_small(storage, 1, 10)
    manifest = take_back(storage, ticket, 0)
    assert manifest is not None and manifest == try_seal(storage, ticket)
    before = storage.list()
    assert not withdraw(storage, ticket.directory, [ticket.receipt_path(0)])
    assert storage.list() == before


def test_a_directory_in_a_manifests_place_stops_no_launch(tmp_path, save_small):
    storage = LocalStorage(tmp_path)
    first, second = (save_small(storage, 1, step) for step in (10, 20))
    (tmp_path / first.manifest_path).mkdir()
    done = roll_forward(storage)
    assert [manifest.ticket for manifest in done.sealed] == [second]
    [left] = done.unsealed
    assert left.directory == first.directory and "not a file" in left.cause
