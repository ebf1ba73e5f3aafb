"""What is listed, in which order, and what is said about the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spotspeed import events
from spotspeed.checkpoint.catalog import find, list_sealed, scan, scan_mended
from spotspeed.checkpoint.ownership import record_restored_from, restored_key
from spotspeed.core.manifest import Ticket
from spotspeed.errors import CorruptionError, ObjectNotFoundError
from spotspeed.storage.contract import Storage
from spotspeed.storage.local import LocalStorage
from spotspeed.storage.memory import MemoryStorage

Save = Callable[..., Ticket]


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "run") if request.param == "local" else MemoryStorage()


@pytest.fixture
def heard() -> Iterator[list[events.Event]]:
    records: list[events.Event] = []
    events.add_sink(records.append)
    yield records
    events.remove_sink(records.append)


def steps(storage: Storage, *, lineage: bool = True) -> list[tuple[int, int]]:
    return [(info.epoch, info.step) for info in list_sealed(storage, lineage=lineage)]


def test_a_path_without_checkpoints_lists_nothing_and_finds_nothing(storage: Storage) -> None:
    assert list_sealed(storage) == []
    with pytest.raises(ObjectNotFoundError, match="no sealed checkpoint"):
        find(storage)


def test_a_directory_that_does_not_exist_is_not_created_by_looking(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "nothing")
    assert list_sealed(storage) == []
    with pytest.raises(ObjectNotFoundError, match="nothing"):
        find(storage)
    assert not (tmp_path / "nothing").exists()


def test_newest_first_with_the_manifests_facts(storage: Storage, seal_small: Save) -> None:
    for step in (20, 5, 100):
        seal_small(storage, 1, step, reason="explicit" if step == 5 else "notice")
    infos = list_sealed(storage)
    assert [info.step for info in infos] == [100, 20, 5]
    newest = infos[0]
    assert newest.tag == "global_step100" and newest.reason == "notice"
    assert newest.world_size == 2 and len(newest.digest) == 64
    shards = [o for o in storage.list(newest.directory) if o.key.endswith(".shard")]
    assert newest.size_bytes == sum(shard.size_bytes for shard in shards)
    assert infos[2].reason == "explicit"


def test_a_directory_without_manifest_is_not_a_checkpoint(
    storage: Storage, save_small: Save, seal_small: Save
) -> None:
    seal_small(storage, 1, 10)
    torn = save_small(storage, 1, 20)
    assert steps(storage) == [(1, 10)]
    assert scan(storage).unsealed == (torn.directory,)


def test_what_was_not_continued_is_off_the_list_but_can_be_asked_for(
    storage: Storage, seal_small: Save
) -> None:
    origin = seal_small(storage, 1, 10)
    seal_small(storage, 1, 20)
    record_restored_from(storage, 2, origin.directory)
    assert steps(storage) == [(1, 10)]
    seal_small(storage, 2, 11)
    assert steps(storage) == [(2, 11), (1, 10)]
    assert steps(storage, lineage=False) == [(2, 11), (1, 10), (1, 20)]
    assert find(storage).step == 11
    assert find(storage, "global_step20").step == 20


def test_a_late_seal_of_a_dead_epoch_changes_nothing(
    storage: Storage, save_small: Save, seal_small: Save
) -> None:
    origin = seal_small(storage, 1, 10)
    record_restored_from(storage, 2, origin.directory)
    seal_small(storage, 1, 30)
    assert find(storage).directory == origin.directory


def test_two_saves_at_one_step_are_told_apart(storage: Storage, seal_small: Save) -> None:
    first = seal_small(storage, 1, 10, attempt="a", created_unix_s=100)
    second = seal_small(storage, 1, 10, attempt="B", created_unix_s=200)
    assert [i.directory for i in list_sealed(storage)] == [second.directory, first.directory]
    assert find(storage, "global_step10").directory == second.directory
    assert find(storage, first.directory).directory == first.directory


def test_named_saves_of_one_second_have_the_order_in_which_they_were_made(
    storage: Storage, seal_small: Save
) -> None:
    names = ["d11-2", "dff-9", "d00-10", "d77-101"]
    for attempt in (names[2], names[0], names[3], names[1]):
        seal_small(storage, 1, 10, attempt=attempt, created_unix_s=100)
    seal_small(storage, 1, 10, attempt="dee-1", created_unix_s=101)
    listed = [info.directory.rpartition(".")[2] for info in list_sealed(storage)]
    assert listed == ["dee-1", *reversed(names)]


@pytest.mark.parametrize("data", [b"", b"\0" * 500, b"{}", b"{"])
def test_a_damaged_manifest_is_told_and_the_others_are_listed(
    storage: Storage, seal_small: Save, heard: list[events.Event], data: bytes
) -> None:
    seal_small(storage, 1, 10)
    broken = seal_small(storage, 1, 20)
    storage.put(broken.manifest_path, data)
    assert steps(storage) == [(1, 10)]
    assert [item.directory for item in scan(storage).damaged] == [broken.directory]
    told = [event for event in heard if isinstance(event, events.FellBack)]
    assert told and told[0].directory == broken.directory


def test_a_manifest_in_the_wrong_directory_is_damage(storage: Storage, seal_small: Save) -> None:
    one, other = seal_small(storage, 1, 10), seal_small(storage, 1, 20)
    storage.put(one.manifest_path, storage.get(other.manifest_path, 1 << 20))
    assert steps(storage) == [(1, 20)]
    assert scan(storage).damaged[0].directory == one.directory


def test_a_damaged_lineage_record_hides_nothing(
    storage: Storage, seal_small: Save, heard: list[events.Event]
) -> None:
    seal_small(storage, 1, 10)
    seal_small(storage, 2, 20)
    storage.put(restored_key(2), b"garbage")
    assert steps(storage) == [(2, 20), (1, 10)]
    assert heard


def test_a_hostile_lineage_record_is_damage_and_ends(
    storage: Storage, seal_small: Save, heard: list[events.Event]
) -> None:
    seal_small(storage, 1, 10)
    data = b'{"epoch":2,"restored_from":"step-000000000010.e000002.a"}\n'
    storage.put(restored_key(2), data)
    assert steps(storage) == [(1, 10)]
    assert heard


def test_the_hint_is_never_trusted(storage: Storage, seal_small: Save) -> None:
    seal_small(storage, 1, 10)
    storage.put("latest.json", b'{"directory":"step-000000000099.e000001.a","digest":"00"}')
    assert find(storage).step == 10
    storage.delete("latest.json")
    assert find(storage).step == 10


def test_a_lost_manifest_is_made_again_for_a_restore(storage: Storage, seal_small: Save) -> None:
    seal_small(storage, 1, 10)
    newest = seal_small(storage, 1, 20)
    (digest,) = [info.digest for info in list_sealed(storage) if info.step == 20]
    storage.delete(newest.manifest_path)
    assert scan(storage).lost[0].tag == "global_step20"
    catalog = scan_mended(storage)
    assert catalog.lost == () and catalog.sealed[0].digest == digest


def test_a_lost_manifest_that_cannot_be_made_again_is_told(
    storage: Storage, seal_small: Save, heard: list[events.Event]
) -> None:
    seal_small(storage, 1, 10)
    newest = seal_small(storage, 1, 20)
    storage.delete(newest.manifest_path)
    storage.delete(newest.receipt_path(0))
    assert [info.step for info in scan_mended(storage).sealed] == [10]
    assert find(storage).step == 10
    assert [event.directory for event in heard if isinstance(event, events.FellBack)] == [
        newest.directory
    ]
    for name in (newest.directory, newest.tag):
        with pytest.raises(CorruptionError, match=r"manifest\.json is gone"):
            find(storage, name)


def test_a_lost_manifest_of_an_abandoned_future_is_not_missed(
    storage: Storage, seal_small: Save
) -> None:
    origin = seal_small(storage, 1, 10)
    storage.delete(seal_small(storage, 1, 20).manifest_path)
    assert len(scan(storage).lost) == 1
    record_restored_from(storage, 2, origin.directory)
    assert scan(storage).lost == ()


def test_an_unknown_tag_names_those_that_are_there(storage: Storage, seal_small: Save) -> None:
    seal_small(storage, 1, 10)
    seal_small(storage, 1, 20)
    with pytest.raises(ObjectNotFoundError, match="global_step20, global_step10"):
        find(storage, "global_step15")
