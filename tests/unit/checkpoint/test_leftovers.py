"""What writes that never ended have left is removed, and nothing that may still be written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spotspeed.checkpoint.gc import collect
from spotspeed.checkpoint.ownership import claim_epoch, epoch_key, record_restored_from
from spotspeed.checkpoint.tiers import check_local_path
from spotspeed.core.frozen import object_path
from spotspeed.core.lineage import Place
from spotspeed.core.manifest import Ticket
from spotspeed.core.owner import Identity
from spotspeed.core.retention import SILENCE_S, Keep, is_left_behind
from spotspeed.errors import OwnedError, StorageError
from spotspeed.storage.local import LocalStorage
from tests.unit.agent.node_rig import Node, next_saver, ticket_of

Save = Callable[..., Ticket]
OLD_S = SILENCE_S + 60


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


def begun(storage: LocalStorage, key: str, *, silent_s: float = OLD_S) -> Path:
    """A write to `key` whose process died that long ago: its hidden file."""
    writer = storage.writer(key)
    writer.write(b"torn" * 100)
    folder = Path(storage.url) / key
    (file,) = [path for path in folder.parent.iterdir() if path.name == writer._temporary]
    then = time.time() - silent_s
    os.utime(file, (then, then))
    return file


def test_old_unfinished_files_go_wherever_they_lie(storage: LocalStorage, seal_small: Save) -> None:
    claim_epoch(storage, identity=Identity("node", "boot", "pid:[1]", 1, 1))
    sealed = seal_small(storage, 1, 10)
    kept = storage.list()
    files = [
        begun(storage, key)
        for key in ("latest.json", epoch_key(2), "asking/1/4", f"unmarked/{sealed.directory}",
                    sealed.shard_path(0), "probe/token")
    ]  # fmt: skip
    planned = collect(storage, Keep(3), epoch=1, dry_run=True)
    assert sorted(planned.leftovers) == sorted(str(file.relative_to(storage.url)) for file in files)
    assert planned.size_bytes == 400 * len(files)
    assert all(file.exists() for file in files), "a dry run"
    assert collect(storage, Keep(3), epoch=1) == planned
    assert not any(file.exists() for file in files)
    assert storage.list() == kept
    assert collect(storage, Keep(3), epoch=1).leftovers == ()


def test_a_write_in_flight_is_left_alone(storage: LocalStorage, seal_small: Save) -> None:
    seal_small(storage, 1, 10)
    writer = storage.writer("latest.json")
    writer.write(b"new")
    assert collect(storage, Keep(3), epoch=1).leftovers == ()
    writer.commit()
    assert storage.get("latest.json", 10) == b"new"


def test_what_the_running_epoch_has_not_sealed_keeps_its_files(
    storage: LocalStorage, seal_small: Save, save_small: Save
) -> None:
    seal_small(storage, 1, 10)
    flying = save_small(storage, 1, 20, ranks=[1])
    file = begun(storage, flying.shard_path(0))
    assert collect(storage, Keep(3), epoch=1).leftovers == ()
    assert file.exists()


def test_what_an_older_epoch_left_goes_with_its_directory(
    storage: LocalStorage, seal_small: Save, save_small: Save
) -> None:
    origin = seal_small(storage, 1, 10)
    torn = save_small(storage, 1, 20, ranks=[1])
    file = begun(storage, torn.shard_path(0))
    storage.put(epoch_key(2), b"claimed")
    record_restored_from(storage, 2, origin.directory)
    seal_small(storage, 2, 11)
    done = collect(storage, Keep(3), epoch=2)
    assert [removal.directory for removal in done.removals] == [torn.directory]
    assert done.leftovers == () and not file.exists()


def test_half_a_frozen_object_goes_once_something_newer_is_sealed(
    storage: LocalStorage, seal_small: Save
) -> None:
    seal_small(storage, 1, 10)
    lost, flying = (Ticket(1, step, "a", f"t{step}", "periodic", 2, 0) for step in (15, 30))
    files = [begun(storage, object_path(t.directory, "0" * 64)) for t in (lost, flying)]
    assert collect(storage, Keep(3), epoch=1).leftovers == ()
    seal_small(storage, 1, 20)
    collect(storage, Keep(3), epoch=1)
    assert [file.exists() for file in files] == [False, True]
    assert not files[0].parent.exists(), "the folder held nothing else"


def test_a_launch_that_was_taken_over_removes_nothing(
    storage: LocalStorage, seal_small: Save
) -> None:
    seal_small(storage, 1, 10)
    file = begun(storage, "latest.json")
    storage.put(epoch_key(2), b"claimed")
    with pytest.raises(OwnedError):
        collect(storage, Keep(3), epoch=1)
    assert file.exists()


def test_nothing_but_a_leftover_can_be_discarded(storage: LocalStorage) -> None:
    storage.put("d/key", b"x")
    file = begun(storage, "d/other")
    (leftover,) = storage.leftovers("d")
    for path in ("d/key", "../d/.tmp-x", "/d/.tmp-x", "d"):
        with pytest.raises(StorageError):
            storage.discard(type(leftover)(path, 0, 0.0))
    (Path(storage.url) / "d" / ".tmp-link").symlink_to("key")
    assert storage.leftovers() == [leftover], "links are nothing that a write leaves"
    storage.discard(leftover)
    storage.discard(leftover)
    assert not file.exists() and storage.get("d/key", 1) == b"x"


@pytest.mark.parametrize(
    ("path", "silent_s", "goes"),
    [("epochs/.tmp-1", SILENCE_S, True), ("epochs/.tmp-1", SILENCE_S - 1, False),
     (".tmp-1", SILENCE_S, True), (".tmp-1", -5.0, False),
     ("step-000000000010.e000001.a/.tmp-1", OLD_S, True),
     ("step-000000000020.e000001.a/.tmp-1", OLD_S, False),
     ("frozen/step-000000000020.e000001.a/.tmp-1", OLD_S, True),
     ("frozen/step-000000000031.e000001.a/.tmp-1", OLD_S, False),
     ("frozen/foreign/.tmp-1", OLD_S, False)],
)  # fmt: skip
def test_the_rule(path: str, silent_s: float, goes: bool) -> None:
    sealed, newest = {"step-000000000010.e000001.a"}, Place(1, 30)
    assert is_left_behind(path, silent_s=silent_s, sealed=sealed, newest=newest) is goes
    if path.startswith("frozen"):
        assert not is_left_behind(path, silent_s=silent_s, sealed=sealed, newest=None)


def test_the_next_saver_of_a_node_clears_its_tier_at_once(tmp_path: Path) -> None:
    path, local_path = tmp_path / "store", tmp_path / "nvme"
    first, ticket = Node(path, local_path), ticket_of(1)
    first.save(ticket)
    torn = begun(first.tier.node, ticket.shard_path(1), silent_s=0.0)
    second = next_saver(first, path, local_path)
    second.tier.open()
    assert not torn.exists() and second.held() == [ticket.directory]


def test_the_root_of_the_node_s_tiers_is_cleared_of_old_files_only(tmp_path: Path) -> None:
    path, local_path = str(tmp_path / "store"), tmp_path / "nvme"
    root = LocalStorage(local_path)
    old, new = begun(root, "probe-1"), begun(root, "probe-2", silent_s=0.0)
    other_job = begun(root, "run-1/step/shard")
    check_local_path(str(local_path), path)
    assert [file.exists() for file in (old, new, other_job)] == [False, True, True]
