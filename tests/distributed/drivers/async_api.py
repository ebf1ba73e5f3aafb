"""spotspeed.async_save, save and load on real engines; asserts, prints what held."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from deepspeed import comm
from engines import RANK, WORLD_SIZE, main, make, raises, train

import spotspeed
from spotspeed import events
from spotspeed.checkpoint import passing, queue
from spotspeed.checkpoint.keep_record import KeepRecord, read_keep
from spotspeed.coordinator import bootstrap
from spotspeed.core.retention import Keep
from spotspeed.errors import (
    CaptureError,
    ConfigError,
    CoordinationError,
    ObjectNotFoundError,
    SpotSpeedError,
    StorageError,
)
from spotspeed.staging.copy_plan import CopyPlan
from spotspeed.storage.local import LocalStorage

FOLDER = Path(sys.argv[1])


def check_without_a_block_the_path_is_the_catalogue() -> None:
    for stage in (0, 3):
        path, handler = FOLDER / f"stage{stage}", signal.getsignal(signal.SIGTERM)
        engine = make(stage)
        train(engine, 2)
        first = spotspeed.async_save(engine, path, client_state={"n": 1})
        second = spotspeed.async_save(engine, path, "mine", {"n": 2})
        after = train(engine, 2)
        third = spotspeed.async_save(engine, str(path))
        assert [h.wait(60).ticket.tag for h in (third, first, second)] == [
            "step-4", "step-2", "mine",
        ]  # fmt: skip
        for handle in (first, second, third):
            assert handle.staging_completion.done() and handle.upload_completion.done()
            done = handle.progress()
            assert done.total_bytes == done.staged_bytes == done.stored_bytes == done.sealed_bytes
            assert done.total_bytes > 0
        again = [spotspeed.save(engine, path, "twice") for _ in range(2)]
        spotspeed.save(engine, path, "twice", {"n": 3})
        twice = [found for found in spotspeed.list_checkpoints(path) if found.tag == "twice"]
        assert len(twice) == 2 and twice[1] == again[1], "one for each content"
        assert spotspeed.load(engine, path).step == 4
        other = make(stage, seed=2)
        restored = spotspeed.load(other, path, "mine")
        assert (restored.client_state, restored.step) == ({"n": 2}, 2)
        assert train(other, 2) == after
        assert signal.getsignal(signal.SIGTERM) is handler, "the process's signals are its own"
        engine.destroy()
        other.destroy()
        assert len(list(path.glob("step-*"))) == 5, "nothing that was not asked for"


def check_a_loop_may_write_to_the_state_after_a_step_that_is_not_lazy() -> None:
    path = FOLDER / "eager"
    block = {"path": str(path), "interval": {"seconds": None, "steps": 1}, "keep": {"last": 99},
             "staging": {"lazy": False, "check": "full"}}  # fmt: skip
    engine = make(2, spotspeed=block)
    checkpointer = spotspeed.attach(engine)
    (master,) = engine.optimizer.single_partition_of_fp32_groups
    for _ in range(20):
        train(engine, 1)
        with torch.no_grad():
            master.mul_(0.5)
    checkpointer.close()
    assert {found.step for found in spotspeed.list_checkpoints(str(path))} == set(range(1, 21))
    engine.destroy()


def check_a_write_to_the_state_right_after_a_save_or_a_step_fails_that_save_by_name() -> None:
    path, run, may_copy = FOLDER / "torn", CopyPlan.run, threading.Event()
    block = {"path": str(path), "interval": {"seconds": None, "steps": 1}, "keep": {"last": 99},
             "staging": {"check": "full"}}  # fmt: skip

    def copy(plan, *arguments):
        assert may_copy.wait(60)
        run(plan, *arguments)

    CopyPlan.run = copy
    lost, engine = [], make(2, spotspeed=block)
    events.add_sink(lost.append)
    checkpointer = spotspeed.attach(engine)
    (master,) = engine.optimizer.single_partition_of_fp32_groups
    for step in range(1, 5):
        may_copy.clear()
        train(engine, 1)
        handle = checkpointer.save() if step % 2 else None
        with torch.no_grad():
            master[-1 - step] += step == 2 or step == 3
        may_copy.set()
        if handle is not None and step == 1:
            handle.wait(timeout=60)
        elif handle is not None:
            error = raises(SpotSpeedError, lambda handle=handle: handle.wait(60))
            assert "fp32:" in str(error) and "changed" in str(error), error
            raises(CaptureError, lambda handle=handle: handle.staging_completion.result(60))
    checkpointer.close()
    CopyPlan.run = run
    events.remove_sink(lost.append)
    assert {found.step for found in spotspeed.list_checkpoints(str(path))} == {1, 4}
    torn = [event.what for event in lost if isinstance(event, events.Lost)]
    assert len(torn) == len(set(torn)) == 3, torn
    engine.destroy()


def check_client_state_is_plain_data_as_it_was() -> None:
    engine = make(1)
    state = {"t": torch.arange(4.0), "a": np.eye(2), "deep": {"list": [1, (2, None)], 3: b"x"}}
    handle = spotspeed.async_save(engine, FOLDER / "state", client_state=state)
    state["t"].zero_()
    state["a"][:] = 0
    state["deep"]["list"].append("late")
    handle.wait(60)
    found = spotspeed.load(engine, FOLDER / "state").client_state
    assert found["t"].tolist() == [0, 1, 2, 3] and np.array_equal(found["a"], np.eye(2))
    assert found["deep"] == {"list": [1, (2, None)], 3: b"x"}
    bad = {"x": {"y": [0, lambda: None]}}
    error = raises(
        CaptureError, lambda: spotspeed.async_save(engine, FOLDER / "state", client_state=bad)
    )
    assert "client_state['x']['y'][1]" in str(error)
    assert len(spotspeed.list_checkpoints(str(FOLDER / "state"))) == 1
    engine.destroy()


def check_what_is_not_there_is_said() -> None:
    engine = make(0)
    raises(ConfigError, lambda: spotspeed.async_save(engine))
    raises(ObjectNotFoundError, lambda: spotspeed.load(engine, FOLDER / "none"))
    assert not (FOLDER / "none").exists()
    spotspeed.save(engine, FOLDER / "some", tag="here")
    error = raises(ObjectNotFoundError, lambda: spotspeed.load(engine, FOLDER / "some", "there"))
    assert "here" in str(error)
    raises(ConfigError, lambda: spotspeed.save(engine, FOLDER / "some", tag="no/name"))
    train(engine, 1)
    engine.destroy()


def check_a_path_that_cannot_be_one_is_said_on_every_rank_before_anything_is_stored() -> None:
    with_block, without = make(1, FOLDER / "places"), make(1)
    (FOLDER / "file").write_text("of the user")
    (FOLDER / "link").is_symlink() or RANK or (FOLDER / "link").symlink_to(FOLDER / "nowhere")
    spotspeed.save(without, FOLDER / "places-2")  # Until then the link is there on every rank.
    calls = (spotspeed.save, spotspeed.async_save, spotspeed.load)
    for path in ("", "  ", FOLDER / "file", FOLDER / "link", "nope://x/y", "a\0b", "memory://x"):
        for engine, call in itertools.product((with_block, without), calls):
            is_absent = call is spotspeed.load and engine is without and "://" not in str(path)
            kind = (ConfigError, ObjectNotFoundError) if is_absent else ConfigError
            raises(kind, lambda call=call, engine=engine, path=path: call(engine, path))
    for path in (FOLDER / "file" / "below", "/proc/spotspeed", FOLDER / ("x" * 300)):
        for engine, call in itertools.product((with_block, without), calls[:2]):
            raises(ConfigError, lambda call=call, engine=engine, path=path: call(engine, path))
    raises(TypeError, lambda: spotspeed.load(without, FOLDER / "places-2", 5))
    raises(ConfigError, lambda: spotspeed.save(without, FOLDER / "places-2", 5))
    for path in (5, b"bytes", ["list"], object()):
        for engine, call in itertools.product((with_block, without), calls):
            raises(TypeError, lambda call=call, engine=engine, path=path: call(engine, path))
    assert not spotspeed.list_checkpoints(str(FOLDER / "places")), "nothing was stored for them"
    assert len(spotspeed.list_checkpoints(str(FOLDER / "places-2"))) == 1
    for engine in (with_block, without):
        train(engine, 1)
        engine.destroy()


def check_engines_and_paths_side_by_side() -> None:
    engines = [make(stage, seed=stage) for stage in (0, 2)]
    for index, engine in enumerate(engines):
        train(engine, 1 + index)
    handles = [spotspeed.async_save(engine, FOLDER / f"side-{index}", tag=f"tag-{index}")
               for index, engine in enumerate(engines)]  # fmt: skip
    after = [train(engine, 2) for engine in engines]
    for handle in handles:
        handle.wait(60)
    for index, engine in enumerate(engines):
        assert spotspeed.load(engine, FOLDER / f"side-{index}").tag == f"tag-{index}"
        assert train(engine, 2) == after[index]
    moved = spotspeed.async_save(engines[0], FOLDER / "elsewhere")
    moved.wait(60)
    assert spotspeed.load(engines[0], FOLDER / "elsewhere").step == 3
    assert spotspeed.load(engines[0], FOLDER / "side-0").step == 1
    for engine in engines:
        engine.destroy()


def check_with_a_block_another_path_gets_markers() -> None:
    engine = make(2, FOLDER / "block")
    train(engine, 1)
    info = spotspeed.save(engine, client_state={"k": 1})
    assert info.tag == "step-1"
    large = torch.arange(400_000.0)
    given = {"k": 2, "large": large, "array": large.numpy().copy()}
    handle = spotspeed.async_save(engine, FOLDER / "marked", client_state=given)
    given["array"][:] = large.zero_()
    after = train(engine, 1)
    handle.wait(60)
    found = spotspeed.load(engine, FOLDER / "marked").client_state
    assert torch.equal(found.pop("large"), torch.arange(400_000.0))
    assert np.array_equal(found.pop("array"), np.arange(400_000, dtype=np.float32))
    assert found == {"k": 2}
    assert (FOLDER / "marked" / "latest").read_text() == "global_step1"
    assert engine.load_checkpoint(FOLDER / "marked")[1]["k"] == 2
    assert spotspeed.load(engine, tag="step-1").client_state == {"k": 1}
    assert train(engine, 1) == after
    raises(ObjectNotFoundError, lambda: spotspeed.load(engine, FOLDER / "unmarked"))
    other = make(1, FOLDER / "warm", seed=2)
    raises(ObjectNotFoundError, lambda: spotspeed.load(other, FOLDER / "block", "nowhere"))
    restored = spotspeed.load(other, FOLDER / "block", "step-1")
    assert (restored.step, restored.client_state) == (1, {"k": 1})
    assert train(other, 1) == after
    spotspeed.save(other)
    found = [info.tag for info in spotspeed.list_checkpoints(str(FOLDER / "warm"))]
    assert found == ["step-2"], "and its own are its own"
    other.destroy()
    engine.destroy()


def check_a_save_that_fails_is_an_error_for_whoever_waits_and_training_goes_on() -> None:
    engine, path = make(1), FOLDER / "broken"
    spotspeed.save(engine, path)
    lost, heard = [], threading.Event()

    def sink(event):
        if isinstance(event, events.Lost) and event.what.startswith("step-"):
            lost.append(event)
            heard.set()

    events.add_sink(sink)
    if RANK == 0:
        shutil.rmtree(path)
        path.write_text("in the way")
    train(engine, 1)
    handle = spotspeed.async_save(engine, path)
    train(engine, 2)
    raises(SpotSpeedError, lambda: handle.wait(60))
    raises(SpotSpeedError, lambda: handle.wait(60))
    assert heard.wait(30)
    events.remove_sink(sink)
    assert len(lost) == 1, lost
    if RANK == 0:
        path.unlink()
    train(engine, 1)
    engine.destroy()


def check_training_goes_on_over_a_full_disk_and_is_saved_when_there_is_room() -> None:
    disk, other, path = FOLDER / "disk", FOLDER / "disk" / "others", FOLDER / "disk" / "run"
    block = {"path": str(path), "interval": {"seconds": None}, "keep": {"last": 1}}
    engine = make(2, spotspeed=block)
    if RANK == 0:
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=False)
    torch.distributed.barrier()
    if os.path.ismount(disk):  # Else this user may not mount.
        try:
            train_over_a_full_disk(engine, path, other)
        finally:
            RANK or subprocess.run(["umount", "-l", str(disk)], check=True)
    engine.destroy()


def train_over_a_full_disk(engine, path: Path, other: Path) -> None:
    checkpointer = spotspeed.attach(engine)
    train(engine, 1)
    first = checkpointer.save().wait(60)
    if RANK == 0:
        fill(other)
    torch.distributed.barrier()
    train(engine, 1)
    handle = checkpointer.save()
    train(engine, 2)
    error = raises(StorageError, lambda: handle.wait(60))
    assert "no space is left" in str(error) and "missing" in str(error), error
    torch.distributed.barrier()
    assert not list(path.glob(f"{handle.ticket.directory}/*")), "its space is given back"
    assert spotspeed.list_checkpoints(str(path))[0].digest == first.digest
    assert spotspeed.open_checkpoint(str(path)).read("body.0.weight", "fp32").any()
    torch.distributed.barrier()
    if RANK == 0:
        other.unlink()
    torch.distributed.barrier()
    train(engine, 1)
    checkpointer.close()
    assert [found.step for found in spotspeed.list_checkpoints(str(path))] == [5, 1]
    while RANK == 0 and (path / handle.ticket.directory).exists():
        time.sleep(0.01)  # The collector has heard of the seal, and removes what failed before it.
    assert read_keep(LocalStorage(path)) == KeepRecord(Keep(1), has_tiers=False)
    torch.distributed.barrier()


def fill(file: Path) -> None:
    """Take all the room that the disk has left."""
    with file.open("wb", buffering=0) as taken:
        for size in (1 << 16, 1 << 12):
            with contextlib.suppress(OSError):
                while taken.write(bytes(size)) == size:
                    pass


def check_ranks_that_disagree_are_told() -> None:
    if WORLD_SIZE == 1:
        return
    engine = make(1, checkpoint={"tag_validation": "Fail"})
    raises(AssertionError, lambda: spotspeed.async_save(engine, FOLDER / "no", f"rank{RANK}"))
    engine.global_steps += RANK
    raises(CoordinationError, lambda: spotspeed.async_save(engine, FOLDER / "no", "same"))
    engine.global_steps -= RANK
    spotspeed.save(engine, FOLDER / "no", "same")
    engine.destroy()


def check_a_save_that_some_ranks_ask_for_alone_is_an_error_and_training_goes_on() -> None:
    if WORLD_SIZE == 1:
        return
    queue.IDLE_S, passing.PATIENCE_S = 0.1, 0.5
    engine, path = make(1), FOLDER / "alone"
    spotspeed.save(engine, path)
    for alone in (0, 1):
        if alone == RANK:
            error = raises(CoordinationError, lambda: spotspeed.async_save(engine, path))
            assert f"ranks [{1 - alone}]" in str(error) and "past it" in str(error), error
        train(engine, 1)
        spotspeed.save(engine, path)
    if RANK == 1:  # Slow, but it will come: it does when the other has asked who is missing.
        while not list((path / "asking").glob("*")):
            time.sleep(0.01)
    spotspeed.async_save(engine, path, "late").wait(60)
    assert spotspeed.load(engine, path, "late").step == 2
    engine.destroy()


def check_a_save_on_one_rank_is_an_error_while_the_others_wait_for_it_in_a_barrier() -> None:
    if WORLD_SIZE == 1:
        return
    bootstrap.TIMEOUT_S = 2.0
    first = make(1)
    if RANK == 0:
        error = raises(CoordinationError, lambda: spotspeed.async_save(first, FOLDER / "first"))
        assert "ranks [1] did not come" in str(error), error
    comm.barrier()
    bootstrap.TIMEOUT_S = 120.0
    spotspeed.save(first, FOLDER / "first")
    block = {"path": str(FOLDER / "barrier"), "interval": {"seconds": None},
             "coordinator": {"asking_timeout_s": 1.0}}  # fmt: skip
    engine = make(2, spotspeed=block)
    spotspeed.attach(engine)
    for alone in (0, 1, 0):
        if alone == RANK:
            error = raises(CoordinationError, lambda: spotspeed.async_save(engine, tag="alone"))
            assert f"missing: ranks [{1 - alone}]" in str(error), error
        comm.barrier()
    train(engine, 1)
    spotspeed.async_save(engine, tag="together").wait(60)
    assert [info.tag for info in spotspeed.list_checkpoints(block["path"])] == ["together"]
    for each in (first, engine):
        each.destroy()


if __name__ == "__main__":
    wanted = sys.argv[2:]
    main([check for name, check in list(globals().items())
          if name.startswith("check_") and (not wanted or name in wanted)])  # fmt: skip
