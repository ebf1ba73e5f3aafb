"""After a crash at any instant the newest sealed checkpoint loads and no promise is broken.

A run of the job writes to a disk that keeps a log (spotspeed/testing/crash_disk.py). After every
entry of the log the disk states that a crash may leave are laid out as real files and read back
with the real readers. Leaving out any one fsync must be noticed.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from spotspeed.checkpoint.catalog import list_sealed, scan
from spotspeed.checkpoint.commit import roll_forward, try_seal
from spotspeed.checkpoint.gc import collect
from spotspeed.checkpoint.ownership import claim_epoch, record_restored_from, release
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.shard import ShardWriter
from spotspeed.codec import digest
from spotspeed.core.chunks import pack
from spotspeed.core.frozen import ObjectRecord, content_of
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket
from spotspeed.core.owner import Identity
from spotspeed.core.retention import Keep
from spotspeed.storage.contract import Storage
from spotspeed.storage.local import LocalStorage
from spotspeed.testing.crash_disk import CrashStates, DiskState, Operation, RecordingDisk
from spotspeed.testing.promises import Call, Promises, PromisingStorage

SEED = 20_261_101
ROOT = "runs/job-7"
ELEMENTS = 1500
WHO = Identity("node", "boot", "pid:[1]", 1, 1)


@dataclass(frozen=True)
class SealPromised:
    """try_seal has returned a manifest for this directory."""

    directory: str


@dataclass(frozen=True)
class RemovalBegun:
    """From here on only the checkpoints in `kept` are promised."""

    kept: frozenset[str]


@dataclass
class Job:
    """Processes of a job that share a recorded disk; each has a store of its own."""

    disk: RecordingDisk
    root: Path

    def process(self) -> Storage:
        return PromisingStorage(LocalStorage(self.root, disk=self.disk), self.disk.log)

    def write(
        self, storage: Storage, ticket: Ticket, rank: int, objects: Sequence[ObjectRecord] = ()
    ) -> None:
        layout = pack([part("fp32", ticket.world_size, rank)], chunk_bytes=4096)
        with ShardWriter(storage, ticket, rank, layout) as writer:
            for chunk in layout.chunks:
                writer.put_chunk(chunk.index, bytes([ticket.step]) * chunk.size_bytes)
            writer.finish(objects)

    def freeze(self, storage: Storage, ticket: Ticket, value: int) -> ObjectRecord:
        """A frozen weight, every byte `value`, written by the save of `ticket`."""
        fragment = part("weight", 1, 0)
        content = content_of([(fragment, digest(bytes([value]) * fragment.size_bytes))])
        layout = pack([fragment], chunk_bytes=4096)
        with ShardWriter(storage, ticket, 0, layout, content=content) as writer:
            for chunk in layout.chunks:
                writer.put_chunk(chunk.index, bytes([value]) * chunk.size_bytes)
            return writer.finish_object()

    def seal(self, storage: Storage, ticket: Ticket) -> None:
        if try_seal(storage, ticket) is not None:
            self.disk.log.append(SealPromised(ticket.directory))


def part(kind: str, world_size: int, rank: int) -> Fragment:
    interval = Interval(0, ELEMENTS).split(world_size, rank)
    return Fragment(TensorKey(kind, "w"), "float32", (ELEMENTS,), interval)


def ticket(epoch: int, step: int) -> Ticket:
    return Ticket(epoch, step, "a", f"global_step{step}", "periodic", 2, 1_700_000_000)


def train_and_restart(job: Job) -> None:
    """Two saves by two ranks, a kill, a restart, a save, a removal, and the close.

    Rank 0 has a frozen weight, which is edited once.
    """
    first, other = job.process(), job.process()
    claim_epoch(first, identity=WHO)
    record_restored_from(first, 1, None)
    frozen = [job.freeze(first, ticket(1, 10), 7)]
    for step in (10, 20):
        for rank, storage in ((1, other), (0, first)):
            job.write(storage, ticket(1, step), rank, [] if rank else frozen)
            job.seal(storage, ticket(1, step))
        frozen = [job.freeze(first, ticket(1, 20), 8)] if step == 10 else frozen
    job.write(other, ticket(1, 30), 1)
    again = job.process()
    roll_forward(again)
    claim_epoch(again, identity=WHO)
    record_restored_from(again, 2, ticket(1, 20).directory)
    for rank in (0, 1):
        job.write(again, ticket(2, 21), rank, [] if rank else frozen)
    job.seal(again, ticket(2, 21))
    job.disk.log.append(RemovalBegun(frozenset({ticket(2, 21).directory})))
    assert len(collect(again, Keep(last=1), epoch=2).frozen) == 1
    release(again, 2)


def save_once(job: Job) -> None:
    """Two ranks claim the path, save, seal, and close."""
    storage = job.process()
    claim_epoch(storage, identity=WHO)
    record_restored_from(storage, 1, None)
    for rank in (0, 1):
        job.write(storage, ticket(1, 10), rank)
        job.seal(storage, ticket(1, 10))
    release(storage, 1)


def race_at_every_fsync(job: Job) -> None:
    """A second process does the same in the middle of each step of the first."""
    one = job.process()
    seen: set[str] = set()

    def intervene(site: str) -> None:
        key = f"{site} {len(job.disk.log)}"
        if "racing" in seen or key in seen:
            return
        seen.update({"racing", key})
        racer = job.process()
        racer.create("epochs/000001.json", b"racer")
        racer.put("shared/rank-00001.receipt", b"racer's receipt" * 40)
        racer.create("shared/manifest.json", b"the same manifest")
        seen.discard("racing")

    job.disk.before = intervene
    one.create("epochs/000001.json", b"one")
    one.put("shared/rank-00000.receipt", b"one's receipt" * 40)
    one.create("shared/manifest.json", b"the same manifest")
    # Whoever removes is alone: an epoch removes nothing that another may still write.
    job.disk.before = lambda site: None
    one.delete("epochs/000001.json")
    one.delete_prefix("shared")


def seal_at_every_fsync(job: Job) -> None:
    """One saver tries to seal in the middle of each step by which another puts the last part.

    It sees a receipt as soon as that has a name, which may be before the name is durable.
    """
    one, other = job.process(), job.process()
    job.write(one, ticket(1, 10), 0)
    is_sealing = False

    def intervene(site: str) -> None:
        nonlocal is_sealing
        if not is_sealing:
            is_sealing = True
            job.seal(one, ticket(1, 10))
            is_sealing = False

    job.disk.before = intervene
    job.write(other, ticket(1, 10), 1)
    job.disk.before = lambda site: None
    job.seal(other, ticket(1, 10))


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: thousands of states are laid out there."""
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else tmp_path))
    yield place
    shutil.rmtree(place)


def explore(
    scenario: Callable[[Job], None], workplace: Path, *, per_point: int, without: str = "",
    stop_at_first: bool = False, every_tear: bool = False,
) -> tuple[CrashStates, list[str], RecordingDisk]:  # fmt: skip
    """Run `scenario`, then check the crash states after every entry of its log."""
    top, place = workplace / "disk", workplace / "state"
    top.mkdir()
    disk = RecordingDisk(top, without=without)
    scenario(Job(disk, top / ROOT))
    crash = CrashStates(disk.top, place, seed=SEED, per_point=per_point,
                        every_tear=every_tear)  # fmt: skip
    promises, sealed, broken = Promises(), set[str](), list[str]()
    for position, entry in enumerate(disk.log):
        if isinstance(entry, Operation):
            crash.take(entry)
        elif isinstance(entry, Call):
            promises.take(entry)
        elif isinstance(entry, SealPromised):
            sealed.add(entry.directory)
        elif isinstance(entry, RemovalBegun):
            sealed &= entry.kept
        has_promised = isinstance(entry, Call) and entry.result is not None
        if has_promised or isinstance(entry, SealPromised):
            crash.renew()
        for _ in crash.laid_out():
            broken += [f"after {position} entries: {complaint}"
                       for complaint in judge(place / ROOT, promises, sealed)]  # fmt: skip
            if broken and stop_at_first:
                return crash, broken, disk
    print(f"seed {SEED}: {crash.states} states, {crash.distinct} distinct")
    return crash, broken, disk


def judge(root: Path, promises: Promises, sealed: set[str]) -> list[str]:
    """What is wrong with the store that a crash left at `root`."""
    storage = LocalStorage(root)
    found = {info.key: storage.get(info.key, info.size_bytes) for info in storage.list()}
    complaints = promises.broken(found)
    catalog = scan(storage)
    complaints += [f"{item.directory} is damaged: {item.cause}" for item in catalog.damaged]
    listed = list_sealed(storage, lineage=False)
    complaints += [f"{name} was sealed and is not listed"
                   for name in sealed - {info.directory for info in listed}]  # fmt: skip
    for info in listed:
        reader = CheckpointReader.open(storage, info.directory, digest=info.digest)
        complaints += [f"{info.directory}: {damage}" for damage in reader.find_damage().damages]
    return complaints


def test_a_crash_at_any_instant_breaks_no_promise(workplace: Path) -> None:
    crash, broken, disk = explore(train_and_restart, workplace, per_point=24, every_tear=True)
    assert broken == []
    assert crash.states >= 4000
    assert len(disk.syncs) >= 6


def test_a_small_epoch_is_explored_exhaustively(workplace: Path) -> None:
    """Every subset of what was not synced, each write torn at every sector, after every entry."""
    crash, broken, _ = explore(save_once, workplace, per_point=sys.maxsize, every_tear=True)
    assert broken == []
    assert crash.sampled == 0, "after each entry all states were laid out, not a sample"
    assert crash.states >= 50_000 and crash.distinct >= 500


def test_the_states_of_one_file_are_all_there(tmp_path: Path) -> None:
    """Its name is there or not, and its content is one of what a torn write may leave."""
    disk, data = RecordingDisk(tmp_path), bytes(range(256)) * 36
    top = os.open(tmp_path, os.O_RDONLY)
    file = disk.create_file(top, "file")
    disk.write(file, memoryview(data), 0)
    for descriptor in (file, top):
        disk.close(descriptor)
    state = DiskState(disk.top)
    for entry in disk.log:
        assert isinstance(entry, Operation)
        state.apply(entry)
    found = list(state.crash_states(random.Random(SEED), sys.maxsize, every_tear=True))
    contents = {b"", bytes(len(data)), data, *(data[:at] for at in range(512, len(data), 512))}
    assert data[:512] in contents and data[:4096] in contents and data[:8192] in contents
    assert {tree["file"] for tree in found if tree} == contents
    assert len(found) == 2 * len(contents) == state.count(every_tear=True)


@pytest.mark.full
def test_a_hundred_thousand_crash_states_break_no_promise(workplace: Path) -> None:
    states = 0
    for scenario, per_point in ((train_and_restart, 1500), (race_at_every_fsync, 1500)):
        place = workplace / scenario.__name__
        place.mkdir()
        crash, broken, _ = explore(scenario, place, per_point=per_point, every_tear=True)
        assert broken == []
        states += crash.states
    assert states >= 100_000


def test_a_crash_while_another_seals_what_has_just_got_a_name_breaks_no_promise(
    workplace: Path,
) -> None:
    crash, broken, _ = explore(seal_at_every_fsync, workplace, per_point=200)
    assert broken == []
    assert crash.states >= 1000


def test_a_crash_in_the_middle_of_a_race_breaks_no_promise(workplace: Path) -> None:
    crash, broken, _ = explore(race_at_every_fsync, workplace, per_point=30)
    assert broken == []
    assert crash.states >= 1000


def _sites() -> list[str]:
    """Every fsync in the code of the local store, by module, function and kind."""
    return [
        "local._unlink: sync_directory",
        "local.delete_prefix: sync_directory",
        "local_tree._enter: sync_directory",
        "local_tree._sync_ancestors: sync_directory",
        "local_writer._publishing: sync_directory",
        "local_writer._publishing: sync_file",
        "local_writer.commit_new: sync_directory",
    ]


def test_the_list_of_fsyncs_is_the_code_s(workplace: Path) -> None:
    _, _, disk = explore(train_and_restart, workplace, per_point=1)
    assert sorted(disk.syncs) == _sites()


@pytest.mark.parametrize("site", _sites())
def test_leaving_out_any_fsync_is_noticed(workplace: Path, site: str) -> None:
    for scenario in (race_at_every_fsync, seal_at_every_fsync, train_and_restart):
        place = workplace / scenario.__name__
        place.mkdir()
        _, broken, _ = explore(scenario, place, per_point=30, without=site, stop_at_first=True)
        if broken:
            print(broken[0])
            return
    pytest.fail(f"no crash state shows that {site!r} is missing")
