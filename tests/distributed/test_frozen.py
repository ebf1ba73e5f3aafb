"""Weights that nothing trains are stored once; later checkpoints refer to them by content."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from spotspeed.checkpoint.catalog import list_sealed, scan
from spotspeed.checkpoint.gc import collect
from spotspeed.checkpoint.ownership import claim_epoch, record_restored_from, release
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.sweep import Sweeper
from spotspeed.config import parse_block
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.lineage import Place
from spotspeed.core.manifest import Manifest, Ticket
from spotspeed.core.retention import Keep
from spotspeed.errors import CorruptionError, StorageError
from spotspeed.staging.staged import StagedSave
from spotspeed.staging.stager import Stager
from spotspeed.storage.local import LocalStorage
from tests.distributed.saver_ranks import stopped
from tests.ranks import run_ranks

LIMIT_S = 60.0
BASE, BIAS, ADAPTER = "base.weight", "base.bias", "adapter.weight"
ELEMENTS = 300_000


class Job:
    """One rank that trains an adapter beside a large base, and the real saver."""

    def __init__(self, path: Path, *, epoch: int | None = None) -> None:
        self.path, self.storage = path, LocalStorage(path)
        self.epoch = epoch or claim_epoch(self.storage).epoch
        if epoch is None:
            record_restored_from(self.storage, self.epoch, None)
        self.stager = Stager(str(path), parse_block({"path": str(path)}), 0)
        torch.manual_seed(0)
        self.frozen = {BASE: torch.randn(ELEMENTS).bfloat16(), BIAS: torch.randn(999)}
        self.adapter = torch.zeros(500)

    def stage(self, step: int, attempt: str = "p", reason: str = "periodic") -> StagedSave:
        self.adapter.fill_(step)
        ticket = Ticket(self.epoch, step, attempt, f"step-{step}", reason, 1, 1_700_000_000)
        pieces = [whole("fp32", ADAPTER, self.adapter)]
        frozen = [whole("weight", name, tensor) for name, tensor in self.frozen.items()]
        blobs = {TensorKey("blob", "job"): b"job"}
        return self.stager.stage(ticket, pieces, blobs, frozen=frozen)

    def save(self, step: int, **how: str) -> Manifest:
        save = self.stage(step, **how)
        return save.upload_completion.result(LIMIT_S)

    def check(self, manifest: Manifest, step: int) -> CheckpointReader:
        """The checkpoint verifies and holds the weights as they are now."""
        reader = CheckpointReader.open(self.storage, manifest.ticket.directory)
        assert reader.verify().is_whole
        for name, tensor in self.frozen.items():
            data = bytearray(tensor.numel() * tensor.element_size())
            reader.read_into([(whole("weight", name, tensor)[0], data)])
            assert bytes(data) == tensor.view(torch.uint8).numpy().tobytes()
        assert reader.read_tensor(TensorKey("fp32", ADAPTER))[0] == step
        return reader

    def objects(self) -> list[str]:
        return [info.key for info in self.storage.list("frozen")]

    def close(self) -> None:
        self.stager.close()
        release(self.storage, self.epoch)


def whole(kind: str, name: str, tensor: torch.Tensor) -> tuple[Fragment, torch.Tensor]:
    dtype, count = str(tensor.dtype).removeprefix("torch."), tensor.numel()
    return Fragment(TensorKey(kind, name), dtype, (count,), Interval(0, count)), tensor


@contextlib.contextmanager
def job_at(path: Path, *, epoch: int | None = None) -> Iterator[Job]:
    job = Job(path, epoch=epoch)
    try:
        yield job
    finally:
        job.close()


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_frozen_weights_are_written_once_and_read_through_every_checkpoint(tmp_path: Path) -> None:
    with job_at(tmp_path) as job:
        manifests = {step: job.save(step) for step in (1, 2, 3)}
        for step, manifest in manifests.items():
            reader = job.check(manifest, step) if step == 3 else None
            assert manifest.object_bytes > 2 * ELEMENTS > 20 * manifest.data_bytes
            if reader is not None:
                assert [item.path for item in reader.objects()] == job.objects()
        [path] = job.objects()
        assert path.startswith("frozen/step-000000000001.")
        infos = list_sealed(job.storage)
        assert [info.step for info in infos] == [3, 2, 1]


def test_an_edit_in_place_is_noticed_whatever_flags_and_counters_say(tmp_path: Path) -> None:
    with job_at(tmp_path) as job:
        job.check(job.save(1), 1)
        base = job.frozen[BASE].requires_grad_(False)
        version = base._version
        base.data[12_345] += 1
        assert base._version == version, "the counter tells nothing of writes through .data"
        second = job.save(2)
        job.check(second, 2)
        assert len(job.objects()) == 2
        # The counter moves and the content does not: nothing is written.
        base.add_(0)
        assert base._version > version
        job.check(job.save(3), 3)
        assert len(job.objects()) == 2


def test_a_relaunch_goes_on_with_the_objects_of_what_it_restored(tmp_path: Path) -> None:
    with job_at(tmp_path) as job:
        first = job.save(1)
    for adopts, count in ((True, 1), (False, 2)):
        with job_at(tmp_path) as job:
            if adopts:
                reader = CheckpointReader.open(job.storage, first.ticket.directory)
                job.stager.adopt(reader.objects())
            job.check(job.save(2), 2)
            assert len(job.objects()) == count


def test_a_save_behind_one_in_flight_refers_only_to_what_is_stored(tmp_path: Path) -> None:
    with job_at(tmp_path) as job:
        first = job.stage(1)
        assert first.wait_staged(LIMIT_S)
        saves = [first, job.stage(2)]
        manifests = [save.upload_completion.result(LIMIT_S) for save in saves]
        assert all(manifest.object_bytes for manifest in manifests)
        for manifest in manifests:
            reader = CheckpointReader.open(job.storage, manifest.ticket.directory)
            assert reader.verify().is_whole
        job.check(job.save(3), 3)


def test_a_damaged_object_fails_every_checkpoint_that_needs_it_and_no_other(tmp_path: Path) -> None:
    with job_at(tmp_path) as job:
        old = job.save(1)
        job.frozen[BASE][0] = 7.0
        new = [job.save(2), job.save(3)]
        name = next(key for key in job.objects() if "step-000000000002" in key)
        flip(tmp_path / name, 4096 + 1000)
        for manifest in new:
            reader = CheckpointReader.open(job.storage, manifest.ticket.directory)
            [damage] = reader.find_damage().damages
            assert name in str(damage) and "#chunk 0" in str(damage)
            with pytest.raises(CorruptionError, match=name):
                reader.read_tensor(TensorKey("weight", BASE))
        opened = CheckpointReader.open(job.storage, old.ticket.directory)
        assert opened.verify().is_whole, "this is what a restore falls back to"
        (tmp_path / name).unlink()
        for manifest in new:
            reader = CheckpointReader.open(job.storage, manifest.ticket.directory)
            with pytest.raises(CorruptionError, match=rf"{name}.*is gone"):
                reader.tensors()


def test_an_object_that_is_gone_fails_the_next_save_and_is_written_by_the_one_after(
    tmp_path: Path,
) -> None:
    with job_at(tmp_path) as job:
        job.save(1)
        (tmp_path / job.objects()[0]).unlink()
        with pytest.raises(StorageError, match="this frozen object is gone"):
            job.save(2)
        assert [info.step for info in list_sealed(job.storage)] == [1]
        job.check(job.save(3), 3)


def test_removing_the_checkpoint_that_wrote_them_takes_nothing_from_the_others(
    tmp_path: Path,
) -> None:
    with job_at(tmp_path) as job:
        for step in (1, 2, 3):
            last = job.save(step)
        removed = collect(job.storage, Keep(1), epoch=job.epoch)
        assert len(removed.removals) == 2 and removed.frozen == ()
        job.check(last, 3)
        assert [info.step for info in list_sealed(job.storage)] == [3]


def test_what_no_checkpoint_refers_to_is_swept_after_another_seal(tmp_path: Path) -> None:
    with job_at(tmp_path) as job:
        job.save(1, reason="explicit")
        job.save(2)
        job.frozen[BASE][5] = 3.0
        job.save(3)
        sweeper = Sweeper(job.storage, is_patient=True, is_quiet=job.stager.is_idle)

        def swept() -> tuple[str, ...]:
            return collect(job.storage, Keep(1), epoch=job.epoch, sweeper=sweeper).frozen

        old, new = sorted(job.objects())
        assert swept() == (), "the explicit save of step 1 refers to it"
        explicit = next(info.directory for info in scan(job.storage).sealed if info.step == 1)
        job.storage.delete_prefix(explicit)
        assert swept() == () and job.objects() == [old, new], "a patient one looks twice"
        last = job.save(4)
        assert swept() == (old,)
        assert job.objects() == [new] and not (tmp_path / old).parent.exists()
        job.check(last, 4)


def test_nothing_is_swept_while_a_save_is_in_flight(tmp_path: Path) -> None:
    with job_at(tmp_path) as job:
        job.save(1)
        (old,) = job.objects()
        job.frozen[BASE][5] = 3.0
        job.save(2)
        collect(
            job.storage, Keep(1), epoch=job.epoch, sweeper=Sweeper(job.storage, is_patient=True)
        )
        busy = Sweeper(job.storage, is_patient=False, is_quiet=lambda: False)
        assert job.stager.is_idle()
        newest = Place(job.epoch, 2)
        assert busy.sweep(newest).paths == () and old in job.objects()
        session = job.stager._session
        assert session is not None
        with stopped(session.saver_pid):
            save = job.stage(3)
            assert not job.stager.is_idle()
        save.upload_completion.result(LIMIT_S)
        assert job.stager.is_idle()
        assert Sweeper(job.storage, is_patient=False).sweep(newest).paths == (old,)


def test_an_abandoned_save_leaves_no_object(tmp_path: Path) -> None:
    with job_at(tmp_path) as job:
        job.save(1)
        job.frozen[BASE][5] = 3.0
        save = job.stage(2)
        save.abandon("the test says so")
        with pytest.raises(StorageError):
            save.upload_completion.result(LIMIT_S)
        last = job.save(3)
        job.check(last, 3)
        assert {key.split("/")[1][:17] for key in job.objects()} <= {
            "step-000000000001", "step-000000000003",
        }  # fmt: skip


def test_too_little_for_an_object_stays_in_the_shard(tmp_path: Path) -> None:
    with job_at(tmp_path) as job:
        job.frozen = {BIAS: torch.randn(999)}
        job.check(job.save(1), 1)
        assert job.objects() == []


@pytest.mark.ranks
@pytest.mark.parametrize("stage,is_resumed", [
    (2, False), pytest.param(2, True, marks=pytest.mark.full),
    pytest.param(3, True, marks=pytest.mark.full),
])  # fmt: skip
def test_a_real_job_writes_its_frozen_base_once_and_after_an_edit(
    tmp_path: Path, stage: int, is_resumed: bool
) -> None:
    def run(ranks: int, mode: str) -> dict[str, Any]:
        out = tmp_path / f"{mode}-{ranks}.json"
        run_ranks(ranks, "tests/distributed/drivers/frozen.py", str(tmp_path / "store"),
                  str(stage), mode, str(out), timeout_s=180)  # fmt: skip
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    base_bytes = 4 * (384 * 384 + 384) * 2
    wrote = run(2, "write")
    first, second, third, edited = (
        after - before for before, after in pairwise(wrote["sizes"])
    )  # fmt: skip
    assert first > base_bytes > 5 * second and abs(third - second) < 8192
    assert edited > second, "the edit of one layer is written"
    if not is_resumed:
        return
    resumed = run(2, "resume")
    again = resumed["sizes"][1] - resumed["sizes"][0]
    assert resumed["step"] == 4 and again < 2 * second, "nothing frozen is written again"
    assert base_bytes < resumed["read"] < 1.2 * base_bytes, "two ranks of one node, one reading"
    if stage < 3:
        assert resumed["sums"]["base.1.weight"] == wrote["sums"]["base.1.weight"]
        assert resumed["sums"]["base.3.bias"] == wrote["sums"]["base.3.bias"]
    other = run(1, "resume")
    assert other["step"] == 7
    assert other["sums"]["base.1.weight"] == resumed["sums"]["base.1.weight"]
    storage = LocalStorage(tmp_path / "store")
    for info in list_sealed(storage):
        reader = CheckpointReader.open(storage, info.directory, digest=info.digest)
        assert reader.verify().is_whole
