"""A record is the state of its boundary, whole and unchanged while it is held."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spotspeed.core.interval import Interval
from spotspeed.core.layout import Extent, StoredTensor
from spotspeed.core.plain import decode, encode
from spotspeed.core.sample_order import SampleOrder
from spotspeed.errors import CaptureError, ConfigError, FormatError, InvalidLayoutError
from spotspeed.state.cursor import Cursor, resume_sample
from spotspeed.state.plain_tensors import from_plain, to_plain
from spotspeed.state.small import SmallState

ORDER = SampleOrder(100, 3, True)


class Model(torch.nn.Module):
    def __init__(self, *, dtype=torch.float32, persistent=True):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(3, dtype=dtype), persistent=persistent)
        self.register_buffer("wide", torch.zeros(2, 4).t())
        self.register_buffer("constant", torch.ones(1).expand(3))
        self.register_buffer("later", None)


def make_engine(*, rank=0, world_size=1, model=None, scheduler=True, lr=0.1):
    """What SmallState reads of an engine: DeepSpeed's own attributes, in their stage 0 shape."""
    module = Model() if model is None else model
    optimizer = torch.optim.AdamW(
        [{"params": [module.layer.weight], "weight_decay": 0.3}, {"params": [module.layer.bias]}],
        lr=lr,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return SimpleNamespace(
        module=module, optimizer=optimizer, lr_scheduler=schedule if scheduler else None,
        global_rank=rank, world_size=world_size, global_steps=0, global_samples=0,
        skipped_steps=0, micro_steps=0, train_batch_size=lambda: 8,
    )  # fmt: skip


def names():
    return [["layer.weight"], ["layer.bias"]]


def make(seed=1, group_names=names, **changes):
    engine = make_engine(**changes)
    return engine, SmallState(engine, group_names, seed=seed)


def step(engine, small):
    """What a forward and an update change."""
    engine.module.count += 1
    engine.module.wide += 1
    random.random(), np.random.rand(), torch.rand(1)
    engine.optimizer.step()
    engine.lr_scheduler.step()
    engine.global_steps += 1
    engine.global_samples += 8
    engine.micro_steps = 5
    small.record()


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def stored(small, record):
    job = from_plain(decode(encode(to_plain(small.job(record)), what="job"), source="job"))
    rank = from_plain(decode(encode(to_plain(small.rank(record)), what="rank"), source="rank"))
    return job, rank


def fill(small, pieces):
    """What a reader does: fill the targets of a fresh engine from stored pieces."""
    tensors = {piece.fragment.key: piece for piece in pieces}
    wanted = {
        key: StoredTensor(piece.fragment.dtype, piece.fragment.shape,
                          (Extent(Interval(0, piece.tensor.numel()), 0, 0),))
        for key, piece in tensors.items()
    }  # fmt: skip
    for target in small.buffer_targets(wanted):
        target.tensor.copy_(tensors[target.fragment.key].tensor)


def test_a_fresh_engine_takes_over_everything():
    engine, small = make()
    small.cursor = Cursor(ORDER, start_sample=16, global_samples=0)
    for _ in range(3):
        step(engine, small)
    record = small.snapshot(3)
    job, rank = stored(small, record)
    expected = draws(), [group["lr"] for group in engine.optimizer.param_groups]
    engine.module.later = torch.full((2,), 7.0)
    step(engine, small)
    again, other = make(seed=99, lr=0.5)
    fill(other, small.buffer_pieces(record))
    assert other.apply(job, rank, written_by=1) == []
    assert draws() == expected[0]
    assert [group["lr"] for group in again.optimizer.param_groups] == expected[1]
    assert [group["weight_decay"] for group in again.optimizer.param_groups] == [0.3, 0.01]
    assert (again.global_steps, again.global_samples, again.micro_steps) == (3, 24, 0)
    assert again.lr_scheduler.state_dict() == {**engine.lr_scheduler.state_dict(),
        **again.lr_scheduler.state_dict(), "last_epoch": 3, "_step_count": 4}  # fmt: skip
    assert again.module.count.tolist() == [3, 3, 3]
    assert again.module.wide.tolist() == [[3, 3]] * 4 and not again.module.wide.is_contiguous()
    assert again.module.constant.tolist() == [1, 1, 1]
    assert resume_sample(job["cursor"], ORDER) == 16 + 24


def test_buffers_that_did_not_exist_yet_are_made():
    engine, small = make()
    engine.module.later = torch.full((2,), 7.0)
    step(engine, small)
    again, other = make()
    fill(other, small.buffer_pieces(small.snapshot(1)))
    other.apply(*stored(small, small.snapshot(1)), written_by=1)
    assert again.module.later.tolist() == [7, 7]


def test_the_last_two_boundaries_are_kept():
    engine, small = make()
    small.record()
    step(engine, small)
    assert (small.snapshot(0).step, small.snapshot(1).step) == (0, 1)
    step(engine, small)
    with pytest.raises(CaptureError, match=r"step 0 is gone: kept \[1, 2\]"):
        small.snapshot(0)


def test_a_record_that_is_held_never_changes_and_one_that_is_not_is_used_again():
    engine, small = make()
    step(engine, small)
    held = small.snapshot(1)
    memory = {tensor.data_ptr() for tensor in held.buffers.tensors}
    seen = set()
    for _ in range(6):
        step(engine, small)
        seen |= {t.data_ptr() for t in small._slots[-1].record.buffers.tensors}
    assert small.buffer_pieces(held)[0].tensor.tolist() == [1, 1, 1]
    assert held.buffers.tensors[0].tolist() == [1, 1, 1]
    assert not memory & seen
    assert len(seen) == 2 * len(memory)


def test_a_reader_never_sees_half_a_record():
    engine, small = make()
    step(engine, small)
    torn, looked, done = [], [], threading.Event()

    def look():
        while not done.is_set():
            newest = engine.global_steps
            try:
                record = small.snapshot(newest)
            except CaptureError:
                continue
            looked.append(newest)
            values = {float(v) for t in record.buffers.tensors[:2] for v in t.flatten()}
            counts = {record.step, record.counters["global_steps"], record.schedule[
                "lr_scheduler"]["state"]["last_epoch"]}  # fmt: skip
            if values != {float(newest)} or counts != {newest}:
                torn.append((newest, values, counts))

    reader = threading.Thread(target=look)
    reader.start()
    while len(looked) < 200:
        step(engine, small)
    done.set()
    reader.join()
    assert torn == []


def test_a_rank_without_a_state_of_its_own_is_reseeded_from_seed_rank_and_step():
    engine, small = make()
    step(engine, small)
    job, rank = stored(small, small.snapshot(1))
    results = {}
    for number in (0, 1, 3):
        _, other = make(rank=number, world_size=4, seed=77)
        draws()
        notes = other.apply(job, rank, written_by=1)
        results[number] = draws()
        assert bool(notes) is (number != 0)
    assert len(set(results.values())) == 3
    _, other = make(rank=3, world_size=8)
    other.apply(job, None, written_by=1)
    assert draws() == results[3]
    _, other = make(rank=3, world_size=8)
    other.apply({**job, "seed": 2}, None, written_by=1)
    assert draws() != results[3]


def test_a_restored_state_is_the_record_of_its_step_cursor_included():
    engine, small = make()
    small.cursor = Cursor(ORDER, start_sample=16, global_samples=0)
    step(engine, small)
    job, rank = stored(small, small.snapshot(1))
    again, other = make()
    other.apply(job, rank, written_by=1)
    draws()
    once_more = stored(other, other.snapshot(1))
    assert once_more[0]["cursor"] == job["cursor"]
    _, third = make()
    third.apply(*once_more, written_by=1)
    first = draws()
    third.apply(job, rank, written_by=1)
    assert draws() == first
    again.global_samples += 8
    other.record()
    assert other.job(other.snapshot(1))["cursor"]["sample"] == job["cursor"]["sample"] + 8


def test_parts_can_be_left_out():
    engine, small = make()
    step(engine, small)
    job, rank = stored(small, small.snapshot(1))
    again, other = make(lr=0.5)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    other.apply(job, rank, written_by=1, parts=("counters",))
    assert again.global_steps == 1
    assert again.lr_scheduler.last_epoch == 0
    assert again.optimizer.param_groups[0]["lr"] == 0.5
    assert torch.equal(torch.get_rng_state(), before)


def test_another_global_batch_is_said():
    engine, small = make()
    step(engine, small)
    job, rank = stored(small, small.snapshot(1))
    other, fresh = make(seed=2)
    other.train_batch_size = lambda: 12
    (note,) = fresh.apply(job, rank, written_by=1)
    assert note.startswith("a step took 8 samples and takes 12 now")
    del job["global_batch"]
    assert make(seed=3)[1].apply(job, rank, written_by=1) == [], "an older checkpoint"


def test_a_scheduler_of_another_class_is_left_alone_and_said_so():
    engine, small = make()
    step(engine, small)
    again, other = make(scheduler=False)
    (note,) = other.apply(*stored(small, small.snapshot(1)), written_by=1)
    assert note == "lr_scheduler: stored LambdaLR, here None: left as it was"
    assert again.optimizer.param_groups[0]["lr"] == 0.05


def test_what_cannot_be_stored_is_refused_at_attach():
    engine = make_engine()
    engine.lr_scheduler.odd = {"key": [object()]}
    with pytest.raises(CaptureError, match=r"job state\['schedule'\]\['lr_scheduler'\]\['state'\]"
                                           r"\['odd'\]\['key'\]\[0\]"):  # fmt: skip
        SmallState(engine, names)
    engine = make_engine()
    engine.lr_scheduler.code = lambda: 0
    engine.module.register_buffer("sparse", torch.eye(2).to_sparse())
    with pytest.raises(CaptureError, match="buffer sparse"):
        SmallState(engine, names)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Model(dtype=torch.float64), r"buffer count is float64\[3\] .* and float32\[3\] as stored"),
        (torch.nn.Sequential(), None),
    ],
)
def test_a_persistent_buffer_of_another_kind_is_refused(model, why):
    engine, small = make()
    step(engine, small)
    pieces = small.buffer_pieces(small.snapshot(1))
    if why is None:
        model = Model()
        model.register_buffer("extra", torch.zeros(1))
        why = "buffer extra .* not in the checkpoint"
    _, other = make(model=model)
    with pytest.raises(InvalidLayoutError, match=why):
        fill(other, pieces)


def test_a_buffer_without_elements_needs_none_that_is_stored():
    engine, small = make()
    step(engine, small)
    pieces = small.buffer_pieces(small.snapshot(1))
    model = Model()
    model.register_buffer("empty", torch.zeros(0, 3))
    again, other = make(model=model)
    fill(other, pieces)  # A save leaves out what has no elements.
    assert again.module.count.tolist() == engine.module.count.tolist()


def test_a_buffer_that_is_not_persistent_may_differ():
    engine, small = make()
    step(engine, small)
    again, other = make(model=Model(dtype=torch.float64, persistent=False))
    fill(other, small.buffer_pieces(small.snapshot(1)))
    other.apply(*stored(small, small.snapshot(1)), written_by=1)
    assert again.module.count.tolist() == [0, 0, 0]
    assert again.module.wide[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    "damage",
    [lambda job: job.pop("counters"), lambda job: job.update(version=9),
     lambda job: job.update(world_size=2), lambda job: job.update(step="1"),
     lambda job: job.update(counters={"global_steps": 1}), lambda job: job.update(groups=[{}]),
     lambda job: job.update(step=2)],
)  # fmt: skip
def test_state_that_is_not_what_was_stored_is_refused(damage):
    engine, small = make()
    step(engine, small)
    job, rank = stored(small, small.snapshot(1))
    damage(job)
    with pytest.raises(FormatError):
        small.apply(job, rank, written_by=1)


def test_a_random_state_that_a_generator_refuses_is_a_format_error():
    engine, small = make()
    step(engine, small)
    job, rank = stored(small, small.snapshot(1))
    rank["rng"]["torch"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(FormatError, match="random generator"):
        small.apply(job, rank, written_by=1)


def test_a_cursor_of_another_stream_is_refused():
    cursor = Cursor(ORDER, start_sample=5, global_samples=100).at(108)
    assert resume_sample(cursor, ORDER) == 13
    assert resume_sample(None, ORDER) == 0
    for other in (SampleOrder(101, 3, True), SampleOrder(100, 4, True), SampleOrder(100, 3, False)):
        with pytest.raises(ConfigError, match="at sample 13"):
            resume_sample(cursor, other)
    for wrong in ({}, {**cursor, "sample": -1}, {**cursor, "sample": None}):
        with pytest.raises(FormatError):
            resume_sample(wrong, ORDER)
