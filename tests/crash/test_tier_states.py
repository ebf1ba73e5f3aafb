"""A crash of the node at any instant between its disk and the store loses nothing that was kept.

Both tiers lie on one recorded disk. After every entry of its log the states that a crash may leave
are laid out, what a next saver does with them is done, and the store is judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from spotspeed.checkpoint.catalog import scan
from spotspeed.checkpoint.commit import roll_forward, try_seal
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.tiers import NodePart, drain_part, is_drained, mark_sealed, survey
from spotspeed.core.lineage import place_of
from spotspeed.core.manifest import MAX_RECEIPT_BYTES, Ticket, decode_receipt
from spotspeed.errors import CorruptionError, StorageError
from spotspeed.storage.local import LocalStorage
from spotspeed.testing.crash_disk import CrashStates, Operation, RecordingDisk
from tests.crash.test_crash_states import Job, ticket, workplace  # noqa: F401  (a fixture)

SEED = 20_261_124
STORE, NODE = "shared/job-7", "nvme/run-7"


@dataclass(frozen=True)
class Kept:
    """Every part of this checkpoint has been promised to be durable on the node."""

    directory: str


def save_and_drain(disk: RecordingDisk, top: Path) -> None:
    """Two saves that are drained, sealed and tidied up after, and one that is only kept."""
    node, store = LocalStorage(top / NODE, disk=disk), LocalStorage(top / STORE, disk=disk)
    job = Job(disk, top / NODE)
    for step in (10, 20, 30):
        saved = ticket(1, step)
        for rank in (1, 0):
            job.write(node, saved, rank)
        disk.log.append(Kept(saved.directory))
        if step == 30:
            return
        for rank in (0, 1):
            drain_part(node, store, _part(node, saved, rank), lambda at: None)
        manifest = try_seal(store, saved)
        assert manifest is not None
        mark_sealed(node, saved.directory, manifest.digest)
        if step == 20:
            node.delete_prefix(ticket(1, 10).directory)


def _part(node: LocalStorage, saved: Ticket, rank: int) -> NodePart:
    key = saved.receipt_path(rank)
    return NodePart(decode_receipt(node.get(key, MAX_RECEIPT_BYTES), source=key))


def judge(place: Path, kept: set[str]) -> list[str]:
    """What is wrong with what the next saver makes of a crash state."""
    node, store = LocalStorage(place / NODE), LocalStorage(place / STORE)
    complaints: list[str] = []
    for found in survey(node):
        for part in () if found.is_sealed else found.parts:
            try:
                if not is_drained(node, store, part):
                    drain_part(node, store, part, lambda at: None)
            except (CorruptionError, StorageError) as error:
                complaints.append(f"{found.directory}: {error}")
    roll_forward(store)
    catalog = scan(store)
    complaints += [f"{item.directory} is damaged: {item.cause}" for item in catalog.damaged]
    sealed = {info.directory: info for info in (*catalog.sealed, *catalog.off_lineage)}
    complaints += [f"{name} was kept on the node and is not sealed" for name in kept - set(sealed)]
    for info in sealed.values():
        reader = CheckpointReader.open(store, info.directory, digest=info.digest)
        complaints += [f"{info.directory}: {damage}" for damage in reader.find_damage().damages]
    return complaints


def explore(
    scenario: Callable[[RecordingDisk, Path], None], place: Path, *, per_point: int,
    without: str = "",
) -> tuple[int, list[str]]:  # fmt: skip
    """States that were judged, and the complaints about the first that is broken."""
    top = place / "disk"
    top.mkdir(parents=True)
    disk = RecordingDisk(top, without=without)
    scenario(disk, top)
    crash = CrashStates(disk.top, place / "state", seed=SEED, per_point=per_point)
    kept: set[str] = set()
    for position, entry in enumerate(disk.log):
        if isinstance(entry, Operation):
            crash.take(entry)
        else:
            assert isinstance(entry, Kept) and place_of(entry.directory)
            kept.add(entry.directory)
            crash.renew()
        for _ in crash.laid_out():
            complaints = judge(place / "state", kept)
            if complaints:
                return crash.states, [f"after {position} entries: {text}" for text in complaints]
    return crash.states, []


def test_what_was_kept_on_a_node_is_sealed_after_a_crash_at_any_instant(
    workplace: Path,  # noqa: F811
) -> None:
    states, complaints = explore(save_and_drain, workplace, per_point=8)
    print(f"seed {SEED}: {states} states")
    assert complaints == []
    assert states >= 500


@pytest.mark.parametrize("site", [
    "local_writer._publishing: sync_file", "local_writer._publishing: sync_directory",
    "local_tree._enter: sync_directory",
])  # fmt: skip
def test_leaving_out_an_fsync_of_the_tier_is_noticed(
    workplace: Path,  # noqa: F811
    site: str,
) -> None:
    _, complaints = explore(save_and_drain, workplace, per_point=8, without=site)
    assert complaints
