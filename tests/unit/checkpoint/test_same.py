"""The same tag, step and content is stored once; what differs in anything stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spotspeed.checkpoint.catalog import list_sealed
from spotspeed.checkpoint.commit import try_seal
from spotspeed.checkpoint.marker import attempt_prefix
from spotspeed.checkpoint.same import keep_one
from spotspeed.codec import CodecPolicy
from spotspeed.core.manifest import Manifest, Ticket
from spotspeed.storage.local import LocalStorage
from tests.unit.checkpoint.conftest import make_tensors, make_ticket, write_checkpoint

PREFIX = attempt_prefix("", "mine")
TENSORS = make_tensors(scale=1)
OTHERS = make_tensors(1, scale=1)


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


@pytest.fixture
def save(storage: LocalStorage) -> Callable[..., Manifest]:
    """One more save of "mine" at step 10, by two ranks."""
    count = 0

    def write(tensors: Any = TENSORS, *, prefix: str = PREFIX, **changes: Any) -> Manifest:
        nonlocal count
        count += 1
        policy = changes.pop("policy", CodecPolicy.choose("none", is_worth=False))
        changes = {"tag": "mine", "reason": "explicit", "created_unix_s": count, **changes}
        ticket = make_ticket(2, attempt=f"{prefix}{count}", **changes)
        path = Path(storage.url)
        return write_checkpoint(path, tensors, 2, ticket=ticket, policy=policy).manifest

    return write


def directories(storage: LocalStorage) -> list[str]:
    return [info.directory for info in list_sealed(storage)]


def test_of_the_same_content_the_newest_stays(
    storage: LocalStorage, save: Callable[..., Manifest]
) -> None:
    first, second = save(), save(policy=CodecPolicy.choose("zstd", is_worth=True))
    assert keep_one(storage, second, PREFIX) == second
    assert directories(storage) == [second.ticket.directory]
    assert storage.list(first.ticket.directory) == []
    older, newer = save(), save()
    assert keep_one(storage, older, PREFIX) == newer, "in whatever order they are asked about"
    assert directories(storage) == [newer.ticket.directory]


def test_what_differs_in_anything_stays(
    storage: LocalStorage, save: Callable[..., Manifest], seal_small: Callable[..., Ticket]
) -> None:
    save(OTHERS)
    save(step=11)
    save(prefix=attempt_prefix("/a/folder", "mine"))
    save(prefix=attempt_prefix("", "yours"), tag="yours")
    seal_small(storage, 1, 10)
    unsealed = save()
    storage.delete(unsealed.ticket.manifest_path)
    before = directories(storage)
    last = save()
    assert keep_one(storage, last, PREFIX) == last
    assert set(directories(storage)) == {*before, last.ticket.directory}
    assert try_seal(storage, unsealed.ticket) is not None, "it may still be sealed"


def test_a_damaged_one_is_left_to_others(
    storage: LocalStorage, save: Callable[..., Manifest]
) -> None:
    damaged = save()
    storage.put(damaged.ticket.shard_path(1), b"no shard")
    last = save()
    assert keep_one(storage, last, PREFIX) == last
    assert len(directories(storage)) == 2
