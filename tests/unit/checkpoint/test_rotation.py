"""Marker directories that a job deletes: their data goes, and nothing else ever does."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spotspeed.checkpoint.catalog import list_sealed
from spotspeed.checkpoint.collector import Collector
from spotspeed.checkpoint.gc import collect
from spotspeed.checkpoint.marker import attempt_prefix, mark
from spotspeed.checkpoint.rotation import given_up, watch
from spotspeed.checkpoint.sealed import open_manifest
from spotspeed.config import KeepConfig
from spotspeed.core.manifest import Ticket
from spotspeed.core.retention import Keep
from spotspeed.integrations.deepspeed_universal import point
from spotspeed.storage.contract import Storage
from spotspeed.storage.local import LocalStorage

Save = Callable[..., Ticket]
Marked = Callable[[int], Path]


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "catalogue")


@pytest.fixture
def marked(storage: LocalStorage, tmp_path: Path, seal_small: Save,
           monkeypatch: pytest.MonkeyPatch) -> Marked:  # fmt: skip
    """Saves a step as Trainer does, to a directory of its own, and returns that."""
    monkeypatch.setattr(shutil, "rmtree", shutil.rmtree)  # whatever wraps it is taken off again

    def save(step: int) -> Path:
        folder, tag = tmp_path / "out" / f"checkpoint-{step}", f"global_step{step}"
        save_marked(storage, seal_small, folder, tag, step)
        return folder

    return save


def test_what_another_tag_of_the_same_folder_names_stays(
    storage: LocalStorage, marked: Marked, seal_small: Save
) -> None:
    folder = marked(5)
    seal_small(storage, 1, 6)
    assert point(folder / "global_step5", folder / "global_step5_universal")
    shutil.rmtree(folder / "global_step5")
    assert not given_up(storage) and steps(storage) == [6, 5]
    shutil.rmtree(folder)
    assert not given_up(storage), "a pointer gives up nothing"


def test_what_is_named_twice_below_what_is_deleted_goes(
    storage: LocalStorage, marked: Marked, seal_small: Save
) -> None:
    folder = marked(5)
    seal_small(storage, 1, 6)
    assert point(folder / "global_step5", folder / "global_step5_universal")
    shutil.rmtree(folder)
    assert steps(storage) == [6]


def save_marked(storage: Storage, seal: Save, folder: Path, tag: str, step: int) -> None:
    attempt = f"{attempt_prefix(str(folder), tag)}{step}"
    ticket = seal(storage, 1, step, attempt=attempt, reason="explicit", tag=tag)
    mark(storage, open_manifest(storage, ticket.directory), str(folder), tag, is_latest=True)
    watch(str(folder), storage)


def steps(storage: Storage) -> list[int]:
    collect(storage, Keep(last=1), epoch=1)
    return [info.step for info in list_sealed(storage)]


def test_what_is_rotated_away_is_collected(storage: LocalStorage, marked: Marked) -> None:
    folders = [marked(step) for step in (5, 10, 15)]
    assert steps(storage) == [15, 10, 5]
    shutil.rmtree(folders[0], ignore_errors=True)
    assert steps(storage) == [15, 10] and not given_up(storage)
    shutil.rmtree(folders[1])
    assert steps(storage) == [15]


def test_a_tag_beside_its_like_is_collected(
    storage: LocalStorage, marked: Marked, seal_small: Save, tmp_path: Path
) -> None:
    out = tmp_path / "tags"
    for step in (5, 10):
        save_marked(storage, seal_small, out, f"global_step{step}", step)
    shutil.rmtree(out / "global_step5")
    assert steps(storage) == [10] and (out / "latest").read_text() == "global_step10"


def test_the_newest_stays_until_something_newer_is_sealed(
    storage: LocalStorage, marked: Marked
) -> None:
    only = marked(5)
    shutil.rmtree(only)
    assert steps(storage) == [5] and given_up(storage)
    marked(10)
    assert steps(storage) == [10]


def test_a_launch_later_the_older_directories_are_known(
    storage: LocalStorage, marked: Marked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spotspeed.checkpoint.rotation._homes", {})
    older = marked(5)
    monkeypatch.setattr("spotspeed.checkpoint.rotation._homes", {})
    marked(10)
    shutil.rmtree(older)
    assert steps(storage) == [10]


@pytest.mark.parametrize("is_across_devices", [False, True])
def test_what_is_moved_away_stays(
    storage: LocalStorage, marked: Marked, tmp_path: Path, is_across_devices: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    older = marked(5)
    marked(10)
    if is_across_devices:

        def rename(*_: Any, **__: Any) -> None:
            raise OSError(errno.EXDEV, "another device")

        monkeypatch.setattr(os, "rename", rename)
    shutil.move(older, tmp_path / "elsewhere")
    assert not older.exists() and (tmp_path / "elsewhere" / "global_step5").is_dir()
    assert steps(storage) == [10, 5]
    shutil.rmtree(tmp_path / "elsewhere")
    assert steps(storage) == [10, 5], "it is not where it was written, so it proves nothing"


def test_a_copy_that_is_deleted_takes_nothing_along(
    storage: LocalStorage, marked: Marked, tmp_path: Path
) -> None:
    older = marked(5)
    marked(10)
    shutil.copytree(older, tmp_path / "out" / "copy")
    shutil.rmtree(tmp_path / "out" / "copy")
    assert steps(storage) == [10, 5]


def test_absence_alone_gives_nothing_up(
    storage: LocalStorage, marked: Marked, tmp_path: Path, seal_small: Save
) -> None:
    marked(5)
    marked(10)
    seal_small(storage, 1, 7, reason="explicit", attempt="x7")
    (tmp_path / "out").rename(tmp_path / "unmounted")
    assert steps(storage) == [10, 7, 5]


def test_what_vanishes_with_all_around_it_is_not_taken_for_deleted(
    storage: LocalStorage, marked: Marked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(path: Any, *_: Any, **__: Any) -> None:
        (tmp_path / "out").rename(tmp_path / "unmounted")

    monkeypatch.setattr(shutil, "rmtree", vanish)
    older = marked(5)
    marked(10)
    shutil.rmtree(older)
    assert steps(storage) == [10, 5]


def test_a_deletion_that_fails_gives_nothing_up(
    storage: LocalStorage, marked: Marked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(shutil, "rmtree", fail)
    older = marked(5)
    marked(10)
    with pytest.raises(PermissionError):
        shutil.rmtree(older)
    assert steps(storage) == [10, 5]


def test_other_deletions_are_as_ever(marked: Marked, tmp_path: Path) -> None:
    marked(5)
    (tmp_path / "other" / "deep").mkdir(parents=True)
    shutil.rmtree(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(FileNotFoundError):
        shutil.rmtree(tmp_path / "other")
    with pytest.raises(TypeError):
        shutil.rmtree(None)  # type: ignore[call-overload]
    assert isinstance(shutil.rmtree.avoids_symlink_attacks, bool)


def test_the_collector_of_the_job_does_it(storage: LocalStorage, marked: Marked) -> None:
    gone = threading.Event()

    class Watched:
        """Tells when the note is gone, which is the last thing to happen."""

        def __getattr__(self, name: str) -> Any:
            return getattr(storage, name)

        def delete(self, key: str) -> None:
            storage.delete(key)
            if key.startswith("unmarked/"):
                gone.set()

    older = marked(5)
    marked(10)
    collector = Collector(Watched(), KeepConfig(), epoch=1)
    shutil.rmtree(older)
    assert gone.wait(60)
    collector.close()
    assert [info.step for info in list_sealed(storage)] == [10]
