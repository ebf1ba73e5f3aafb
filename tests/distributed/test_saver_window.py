"""What is sealed is one step's state: the real saver, and tensors that change at any moment."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from spotspeed import events
from spotspeed.checkpoint.catalog import list_sealed
from spotspeed.checkpoint.queue import SaveHandle, SaveQueue
from spotspeed.config import parse_block
from spotspeed.errors import CaptureError, StorageError
from spotspeed.staging import flow
from spotspeed.staging.client import SaverSession
from spotspeed.staging.copy_plan import CopyPlan
from spotspeed.staging.staged import StagedSave
from spotspeed.staging.stager import Stager
from spotspeed.storage.local import LocalStorage
from tests.distributed.drivers.saver_rank import Pieces, pieces_of, ticket_of
from tests.distributed.saver_ranks import check_sealed, stopped, wait_gone

LIMIT_S = 60.0
COUNT, ELEMENTS = 6, 100_000
SLOT_BYTES = 256 * 1024
SHARE_BYTES = COUNT * ELEMENTS * 4


class Node:
    """A rank of its own in this process, with a real saver."""

    def __init__(self, path: Path, check: str, host_memory_gb: float | None = None) -> None:
        staging = {"check": check, "host_memory_gb": host_memory_gb}
        block = {"path": str(path), "staging": staging}
        self.path, self.config = path, parse_block(block)
        self.stager = Stager(str(path), self.config, 0)
        self.stager.reserve(SHARE_BYTES)

    @property
    def session(self) -> SaverSession:
        session = self.stager._session
        assert session is not None
        return session

    def stage(self, step: int, pieces: Pieces | None = None) -> StagedSave:
        pieces = pieces or pieces_of(step, 0, COUNT, ELEMENTS)
        return self.stager.stage(ticket_of(step, 1), pieces, {})

    def sealed_steps(self) -> list[int]:
        return [info.step for info in list_sealed(LocalStorage(str(self.path)))]

    def check(self, step: int) -> None:
        check_sealed(self.path, step, world_size=1, count=COUNT, elements=ELEMENTS)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Makes the test's node; no saver is left behind."""
    made: list[Node] = []

    def make(check: str = "full", **memory: float) -> Node:
        made.append(Node(tmp_path / "store", check, **memory))
        return made[-1]

    yield make
    for node in made:
        saver = node.session.saver_pid
        node.stager.close()
        os.kill(saver, signal.SIGKILL)  # It would leave by itself, in its own time.
        wait_gone(saver)


def run_before(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Have `act` called with the number of each batch just before it is copied."""
    run, numbers = CopyPlan.run, iter(range(1_000_000))

    def acting(plan: CopyPlan, *arguments: Any) -> None:
        act(next(numbers))
        run(plan, *arguments)

    monkeypatch.setattr(CopyPlan, "run", acting)


def test_every_change_while_a_save_is_copied_fails_it_by_name_and_nothing_is_sealed(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = node()
    monkeypatch.setattr(flow, "BATCH_BYTES", SLOT_BYTES)
    batches = -(-ELEMENTS * COUNT * 4 // SLOT_BYTES)
    for seed in range(1, 21):
        chooser = random.Random(seed)
        pieces = pieces_of(seed, 0, COUNT, ELEMENTS)
        number, element = chooser.randrange(COUNT), chooser.randrange(ELEMENTS)
        when, tensor = chooser.randrange(batches), pieces[number][1]

        def change(batch: int, when: int = when, tensor: Any = tensor, at: int = element) -> None:
            if batch == when:
                tensor[at] += 1

        with monkeypatch.context() as patch:
            run_before(patch, change)
            save = here.stage(seed, pieces)
            error = save.upload_completion.exception(LIMIT_S)
        assert isinstance(error, CaptureError), (seed, number, element, when)
        assert f"fp32:layer.{number}" in str(error)
        assert isinstance(save.staging_completion.exception(0), CaptureError)
    good = here.stage(21)
    good.upload_completion.result(LIMIT_S)
    assert here.sealed_steps() == [21]
    here.check(21)
    assert here.session.pool.free_count == here.session.pool.slot_count


def test_a_change_after_staging_is_allowed_and_is_not_in_the_checkpoint(
    node: Callable[..., Node],
) -> None:
    here = node()
    pieces = pieces_of(1, 0, COUNT, ELEMENTS)
    with stopped(here.session.saver_pid):
        save = here.stage(1, pieces)
        save.staging_completion.result(LIMIT_S)
        for _, tensor in pieces:
            tensor.zero_()
    save.upload_completion.result(LIMIT_S)
    here.check(1)


def test_callbacks_may_ask_the_save_that_they_are_told_of(node: Callable[..., Node]) -> None:
    here, told = node("sampled"), list[Any]()
    handle, is_looking = SaveHandle(ticket_of(1, 1)), threading.Event()

    def look(future: Future[Any]) -> None:
        is_looking.set()
        told.append((handle.progress().staged_bytes, handle.level))
        handle.abandon("a callback may say so, too")

    handle.staging_completion.add_done_callback(look)
    with stopped(here.session.saver_pid):
        handle._begin(lambda handle, _: here.stager.stage(
            handle.ticket, pieces_of(1, 0, COUNT, ELEMENTS), {}), None)  # fmt: skip
        assert is_looking.wait(LIMIT_S)
        with pytest.raises(StorageError, match="a callback may say so"):
            handle.wait(LIMIT_S)
    assert told == [(SHARE_BYTES, "process")]


def test_a_copy_that_fails_keeps_no_slot(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = node("off")
    with monkeypatch.context() as patch:

        def fail(batch: int) -> None:
            raise RuntimeError("an accelerator's error")

        run_before(patch, fail)
        save = here.stage(1)
        with pytest.raises(CaptureError, match="an accelerator's error"):
            save.upload_completion.result(LIMIT_S)
    here.stage(2).upload_completion.result(LIMIT_S)
    assert here.session.pool.free_count == here.session.pool.slot_count
    here.check(2)


@pytest.mark.parametrize("fragments", [1, 6_000], ids=["full pool", "full socket"])
def test_a_saver_that_stands_still_holds_a_step_no_longer_than_it_may(
    node: Callable[..., Node], fragments: int
) -> None:
    """Be it that no slot comes back, or that the saver does not even read."""
    here, heard = node(host_memory_gb=0.0012), list[events.Event]()
    elements = 4 * ELEMENTS * COUNT // fragments
    saves = SaveQueue(
        lambda handle: None,
        lambda handle, _: here.stager.stage(
            handle.ticket, pieces_of(handle.step, 0, fragments, elements), {}
        ),
        lambda step, over: None,
    )
    events.add_sink(heard.append)
    try:
        with stopped(here.session.saver_pid):
            handle = saves.submit(ticket_of(1, 1))
            held_s = saves.close_window(0.3)
            assert handle.has_failed and held_s < 10, "30 s would be the default"
            with pytest.raises(StorageError, match=r"held a step for more than 0\.3 s"):
                handle.wait(0)
        lost = [event for event in heard if isinstance(event, events.Lost)]
        assert [event.what for event in lost] == [ticket_of(1, 1).directory]
        second = saves.submit(ticket_of(2, 1))
        second.wait(timeout=LIMIT_S)
        assert here.sealed_steps() == [2]
        assert here.session.pool.free_count == here.session.pool.slot_count
    finally:
        events.remove_sink(heard.append)
        saves.close()
