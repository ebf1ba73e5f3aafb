"""`spotspeed gc` where no job is alive: it keeps what the job kept, and clears up after crashes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spotspeed import cli
from spotspeed.checkpoint.catalog import list_sealed, scan
from spotspeed.checkpoint.gc import Scope, collect
from spotspeed.checkpoint.keep_record import KeepRecord, read_keep, record_keep
from spotspeed.checkpoint.ownership import OWNER_KEY, claim_epoch, release
from spotspeed.core.manifest import Ticket
from spotspeed.core.owner import Identity, State, encode_owner
from spotspeed.core.retention import SILENCE_S, Keep, Work
from spotspeed.errors import FormatError
from spotspeed.storage.contract import Storage
from spotspeed.storage.local import LocalStorage

Save = Callable[..., Ticket]
WHO = Identity("node-b", "another boot", "pid:[9]", 12, 34)
KEEP = Keep(2, 300)


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "run")


def gc(storage: Storage, *words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, ["gc", storage.url, *words, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if code == 0 else result.output


def end(
    storage: Storage, state: State = "released", *, ago_s: float = 0.0, has_tiers: bool = False
) -> None:
    """A job claimed the path, said what it keeps, and came to this end so long ago."""
    claimed = claim_epoch(storage, identity=WHO)
    record_keep(storage, claimed.epoch, KeepRecord(KEEP, has_tiers))
    then = int(time.time() - ago_s)
    storage.put(OWNER_KEY, encode_owner(claimed.record.renewed(then, state)))


def steps(storage: Storage) -> list[int]:
    return [info.step for info in list_sealed(storage)]


def test_what_the_job_keeps_for_ever_is_kept_by_the_command_line(
    storage: LocalStorage, seal_small: Save
) -> None:
    end(storage)
    for step in (200, 300, 400, 600, 900, 1000, 1100):
        seal_small(storage, 1, step)
    assert gc(storage, "--dry-run")["keep"] == {"last": 2, "every_steps": 300}
    gc(storage)
    assert steps(storage) == [1100, 1000, 900, 600, 300]
    gc(storage, "--keep-last", "1")
    assert steps(storage) == [1100, 900, 600, 300]
    gc(storage, "--every-steps", "600")
    assert steps(storage) == [1100, 900, 600]
    gc(storage, "--every-steps", "0")
    assert steps(storage) == [1100, 900]


def test_where_no_job_has_said_what_it_keeps_nothing_goes_unasked(
    storage: LocalStorage, seal_small: Save
) -> None:
    for step in (10, 20, 30, 40, 50):
        seal_small(storage, 1, step)
    done = gc(storage)
    assert done["removals"] == [] and "--keep-last" in done["notes"][0]
    gc(storage, "--keep-last", "2")
    assert steps(storage) == [50, 40]


def test_the_newest_epoch_that_has_said_something_counts(storage: LocalStorage) -> None:
    assert read_keep(storage) is None
    for epoch in (1, 2):
        record_keep(storage, epoch, KeepRecord(Keep(epoch), has_tiers=True))
    storage.put("epochs/000003.json", b"a claim of somebody who said nothing")
    assert read_keep(storage) == KeepRecord(Keep(2), has_tiers=True)


def test_a_damaged_record_is_no_licence_to_remove(storage: LocalStorage, seal_small: Save) -> None:
    end(storage)
    for step in (10, 20, 30, 40):
        seal_small(storage, 1, step)
    key = "epochs/000001.keep.json"
    for damaged in (b"", b"{}", storage.get(key, 4096).replace(b'"last":2', b'"last":1')):
        storage.put(key, damaged)
        with pytest.raises(FormatError, match=r"000001\.keep\.json"):
            read_keep(storage)
        assert "--keep-last" in gc(storage, code=1)
    gc(storage, "--keep-last", "3", "--every-steps", "0")
    assert steps(storage) == [40, 30, 20]


def test_what_a_crash_left_of_the_newest_epoch_goes_and_what_is_complete_is_sealed(
    storage: LocalStorage, seal_small: Save, save_small: Save
) -> None:
    end(storage)
    seal_small(storage, 1, 10)
    older = save_small(storage, 1, 5, ranks=[0])
    newer = save_small(storage, 1, 30, ranks=[1])
    complete = save_small(storage, 1, 20)
    with storage.writer("step-000000000040.e000001.a/rank-00000.shard") as writer:
        writer.write(b"a rank that died in the middle of it")
        planned = gc(storage, "--dry-run")
        done = gc(storage)
    assert done["sealed"] == planned["sealed"] == [complete.directory]
    assert done["notes"] == planned["notes"] == []
    removed = {removal["directory"] for removal in done["removals"]}
    assert removed == {older.directory, newer.directory, "step-000000000040.e000001.a"}
    assert removed == {removal["directory"] for removal in planned["removals"]}
    assert steps(storage) == [20, 10] and scan(storage).unsealed == ()


def test_a_job_that_was_not_closed_is_given_time_for_its_savers(
    storage: LocalStorage, save_small: Save
) -> None:
    end(storage, "draining", ago_s=SILENCE_S - 60)
    left = save_small(storage, 1, 10, ranks=[0])
    note = gc(storage)["notes"][-1]
    assert left.directory in note and "savers may still write" in note
    end(storage, "draining", ago_s=SILENCE_S)
    left = save_small(storage, 2, 20, ranks=[0])
    assert left.directory in {removal["directory"] for removal in gc(storage)["removals"]}


def test_what_a_node_s_disk_may_complete_stays_until_something_newer_is_sealed(
    storage: LocalStorage, seal_small: Save, save_small: Save
) -> None:
    end(storage, has_tiers=True)
    periodic = save_small(storage, 1, 10, ranks=[0])
    explicit = save_small(storage, 1, 11, ranks=[0], reason="explicit")
    done = gc(storage)
    assert done["removals"] == [] and "a node's own disk" in done["notes"][-1]
    seal_small(storage, 1, 20)
    assert [removal["directory"] for removal in gc(storage)["removals"]] == [periodic.directory]
    assert scan(storage).unsealed == (explicit.directory,)


def test_a_running_job_collects_what_failed_before_its_newest_seal(
    storage: LocalStorage, seal_small: Save, save_small: Save
) -> None:
    claim_epoch(storage, identity=WHO)
    failed = save_small(storage, 1, 10, ranks=[0])
    awaited = save_small(storage, 1, 20, ranks=[0])
    complete = save_small(storage, 1, 21)
    work = Work(frozenset({awaited.directory}), has_tiers=False)
    assert collect(storage, Keep(9), epoch=1, scope=Scope(work=work)).removals == ()
    seal_small(storage, 1, 30)
    coming = save_small(storage, 1, 40, ranks=[0])
    assert collect(storage, Keep(9), epoch=1).removals == ()
    done = collect(storage, Keep(9), epoch=1, scope=Scope(work=work))
    assert [removal.directory for removal in done.removals] == [failed.directory]
    assert set(scan(storage).unsealed) == {
        awaited.directory, complete.directory, coming.directory,
    }  # fmt: skip


def test_what_is_sealed_in_the_middle_of_its_removal_stays_whole(
    storage: LocalStorage, seal_small: Save, save_small: Save
) -> None:
    """Another node's saver brings the last receipt, and seals, after the collector has looked."""
    late = save_small(storage, 1, 10, ranks=[0])
    seal_small(storage, 1, 20)

    class Late(LocalStorage):
        def delete(self, key: str) -> None:
            if key == late.receipt_path(0):
                seal_small(storage, 1, 10)
            super().delete(key)

    racing = Late(Path(storage.url))
    collect(racing, Keep(9), epoch=1, scope=Scope(work=Work(has_tiers=False)))
    assert steps(storage) == [20, 10]
    assert len(storage.list(late.directory)) == 5


def test_a_closed_job_is_over_at_once(storage: LocalStorage, save_small: Save) -> None:
    end(storage, "training")
    release(storage, 1)
    save_small(storage, 1, 10, ranks=[0])
    assert len(gc(storage)["removals"]) == 1
