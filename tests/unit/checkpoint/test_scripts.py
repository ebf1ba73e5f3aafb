"""Worlds that one script starts at a path are told from a job that was started twice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from spotspeed.checkpoint.marker import attempt_prefix, is_for_a_directory
from spotspeed.checkpoint.ownership import claim_epoch, read_owner
from spotspeed.checkpoint.processes import identity_of, this_process
from spotspeed.checkpoint.scripts import (
    claim,
    descends,
    end,
    next_place,
    place,
    this_script,
)
from spotspeed.core.documents import stamp
from spotspeed.core.manifest import Ticket
from spotspeed.core.owner import Identity
from spotspeed.errors import OccupiedError, OwnedError
from spotspeed.storage import open_storage
from spotspeed.storage.memory import MemoryStorage

Save = Callable[..., Ticket]


@pytest.fixture
def child() -> Iterator[Identity]:
    """A living process that this one has started."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield identity_of(process.pid)
        process.communicate()


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage("job")


def test_a_path_that_a_living_process_of_the_script_has_is_occupied(
    storage: MemoryStorage, child: Identity
) -> None:
    claim_epoch(storage, identity=child)
    with pytest.raises(OccupiedError, match="give each a path"):
        claim(storage)
    owner = read_owner(storage)
    assert owner is not None and owner.identity == child, "nothing was taken"


def test_a_living_process_of_nobody_here_is_another_job(storage: MemoryStorage) -> None:
    claim_epoch(storage, identity=identity_of(os.getppid()))
    with pytest.raises(OwnedError) as caught:
        claim(storage)
    assert type(caught.value) is OwnedError


def test_what_the_script_itself_has_claimed_before_is_its_own(storage: MemoryStorage) -> None:
    assert claim(storage)[1] is False
    assert claim(storage)[1] is True
    storage.delete("epochs/000002.script.json")
    assert claim(storage)[1] is False, "a launch of which nothing is known is somebody else's"
    storage.put("epochs/000003.script.json", b"no record")
    assert claim(storage)[1] is False


def test_a_world_that_has_ended_is_done_with_and_the_next_has_its_own_place(tmp_path: Path) -> None:
    path = str(tmp_path / "job")
    assert place(path, 1) == path and place(f"{path}/", 3) == f"{path}/engine-3"
    first = claim(open_storage(path))[0]
    assert next_place(path, 1) == 1, "it may have been interrupted"
    end(open_storage(path), first.epoch)
    assert next_place(path, 1) == 2
    claim(open_storage(path))
    assert next_place(path, 1) == 1, "one that has ended is followed by one that has not"


def test_what_another_script_has_ended_is_gone_on_with(tmp_path: Path, child: Identity) -> None:
    storage = open_storage(str(tmp_path))
    epoch = claim(storage)[0].epoch
    record = {"epoch": epoch, "script": asdict(child), "has_ended": True}
    storage.put(f"epochs/{epoch:06d}.script.json", stamp(record))
    assert next_place(str(tmp_path), 1) == 1


@pytest.mark.parametrize("attempt, number", [("p", 1), (f"{attempt_prefix('/out', 'a')}1", 2)])
def test_a_world_that_died_is_gone_on_with_but_for_saves_to_directories(
    tmp_path: Path, seal_small: Save, attempt: str, number: int
) -> None:
    storage = open_storage(str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        script, world = this_script(), identity_of(process.pid)
        epoch = claim_epoch(storage, identity=world).epoch
        body = {"epoch": epoch, "script": asdict(script), "has_ended": False}
        storage.put(f"epochs/{epoch:06d}.script.json", stamp(body))
        seal_small(storage, epoch, 4, attempt=attempt, tag="a")
        assert next_place(str(tmp_path), 1) == 1, "it lives"
        process.communicate()
    assert next_place(str(tmp_path), 1) == number


def test_only_processes_of_this_machine_descend_from_it(child: Identity) -> None:
    assert this_script() == this_process()
    assert descends(child, this_script()) and descends(this_process(), this_script())
    assert not descends(identity_of(os.getppid()), this_script())
    assert not descends(replace(child, boot_id="another"), this_script())


def test_a_save_to_a_directory_is_told_from_one_to_the_catalogue() -> None:
    assert is_for_a_directory(f"{attempt_prefix('/out', 'step-5')}1", "step-5")
    assert not is_for_a_directory(f"{attempt_prefix('', 'step-5')}1", "step-5")
    for attempt in ("p", "final", "g1", "xstep-5", "dcafe-1"):
        assert not is_for_a_directory(attempt, "step-5"), attempt
