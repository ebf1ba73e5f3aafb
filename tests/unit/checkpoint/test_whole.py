"""Imported checkpoints stand side by side, and never push a run's own off its history unasked."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spotspeed.checkpoint.catalog import find, list_sealed, scan
from spotspeed.checkpoint.gc import collect
from spotspeed.checkpoint.ownership import read_owner, record_restored_from
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.whole import blob, write_whole
from spotspeed.core.layout import TensorKey
from spotspeed.core.manifest import Manifest, Ticket
from spotspeed.core.retention import Keep
from spotspeed.errors import ConfigError
from spotspeed.storage.memory import MemoryStorage

Save = Callable[..., Ticket]
KEY = TensorKey("blob", "job")


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage("job")


def write(storage: MemoryStorage, step: int, *, replaces: bool = False) -> Manifest:
    tag = f"global_step{step}"
    return write_whole(storage, [blob(KEY, tag.encode())], tag=tag, step=step, replaces=replaces)


def tags(storage: MemoryStorage) -> list[str]:
    return [info.tag for info in list_sealed(storage)]


def test_several_are_one_history_in_whatever_order_they_come(storage: MemoryStorage) -> None:
    for step in (20, 10, 30):
        write(storage, step)
    assert tags(storage) == ["global_step30", "global_step20", "global_step10"]
    again = write(storage, 20)
    assert len(tags(storage)) == 4 and find(storage).directory == again.ticket.directory
    for info in list_sealed(storage):
        reader = CheckpointReader.open(storage, info.directory, digest=info.digest)
        assert reader.read_tensor(KEY).tobytes() == info.tag.encode()
    owner = read_owner(storage)
    assert owner is not None and (owner.epoch, owner.state) == (4, "released")


def test_a_run_that_began_from_one_goes_on_from_it(
    storage: MemoryStorage, seal_small: Save
) -> None:
    origin = write(storage, 10)
    write(storage, 20)
    record_restored_from(storage, 3, origin.ticket.directory)
    seal_small(storage, 3, 11)
    collect(storage, Keep(1), epoch=3)
    assert tags(storage) == ["global_step11", "global_step10"]
    assert find(storage, "global_step20").step == 20, "what was imported is never removed"


def test_a_run_s_own_checkpoints_are_not_pushed_aside_unasked(
    storage: MemoryStorage, seal_small: Save
) -> None:
    record_restored_from(storage, 1, None)
    for step in (10, 20):
        seal_small(storage, 1, step)
    before = storage.list()
    with pytest.raises(ConfigError, match=r"2 checkpoints of a run.*'global_step20'.*--replace"):
        write(storage, 5)
    assert storage.list() == before
    write(storage, 5, replaces=True)
    assert tags(storage) == ["global_step5"]
    assert [info.step for info in scan(storage).off_lineage] == [20, 10]
