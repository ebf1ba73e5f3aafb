"""A save handle tells everybody who asks, whatever any one of them does with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest

from spotspeed import events
from spotspeed.checkpoint.queue import SaveHandle, SaveQueue
from spotspeed.core.manifest import Manifest, Ticket
from spotspeed.errors import StorageError

LIMIT_S = 30.0
TICKET = Ticket(1, 10, "a", "step-10", "periodic", 1, 0)
MANIFEST = Manifest(TICKET, (), 0)


@pytest.fixture
def heard() -> Iterator[list[events.Event]]:
    found: list[events.Event] = []
    events.add_sink(found.append)
    yield found
    events.remove_sink(found.append)


def test_a_waiter_without_patience_cancels_nothing_for_the_others() -> None:
    handle = SaveHandle(TICKET)

    async def wait(future: object) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(future), 0.001)  # type: ignore[arg-type]

    for future in (handle.staging_completion, handle.stored_completion, handle.upload_completion):
        asyncio.run(wait(future))
        assert not future.cancel() and not future.cancelled()
    marked = handle.then(lambda manifest: manifest)
    asyncio.run(wait(marked.upload_completion))
    handle.upload_completion.set_result(MANIFEST)
    assert handle.wait(LIMIT_S) is marked.wait(LIMIT_S) is MANIFEST


def test_the_patience_of_wait_has_a_position_and_two_names() -> None:
    handle = SaveHandle(TICKET)
    for wait in (
        lambda: handle.wait(0), lambda: handle.wait(timeout=0), lambda: handle.wait(timeout_s=0),
    ):  # fmt: skip
        with pytest.raises(TimeoutError):
            wait()
    handle.upload_completion.set_result(MANIFEST)
    assert handle.wait() is handle.wait(timeout_s=1) is MANIFEST


def test_what_cannot_be_finished_after_the_seal_is_told_once(heard: list[events.Event]) -> None:
    handle = SaveHandle(TICKET)

    def finish(manifest: Manifest) -> Manifest:
        raise StorageError("the marker cannot be written")

    marked = handle.then(finish)
    handle.upload_completion.set_result(MANIFEST)
    with pytest.raises(StorageError, match="the marker"):
        marked.wait(LIMIT_S)
    (lost,) = heard
    assert isinstance(lost, events.Lost) and "the marker" in lost.cause
    assert TICKET.directory in lost.what


def test_a_save_that_fails_is_told_once_whatever_was_to_follow(heard: list[events.Event]) -> None:
    def fail(handle: SaveHandle) -> None:
        raise StorageError("no disk")

    saves = SaveQueue(fail, lambda handle, _: pytest.fail("begun"), lambda step, over: None)
    marked = saves.submit(TICKET).then(lambda manifest: manifest)
    with pytest.raises(StorageError, match="no disk"):
        marked.wait(LIMIT_S)
    saves.close()
    saves._thread.join(LIMIT_S)
    assert [event for event in heard if isinstance(event, events.Lost)] == heard
    assert len(heard) == 1


def test_the_log_warns_once_of_a_cause_and_again_after_another_or_a_success(
    heard: list[events.Event], caplog: pytest.LogCaptureFixture
) -> None:
    causes = ["no space in step-1", "no space in step-2", "read-only", "no space in step-4", "",
              "no space in step-6", "no space in step-7"]  # fmt: skip

    def fail(handle: SaveHandle) -> None:
        if causes[handle.step]:
            raise StorageError(causes[handle.step])
        handle.upload_completion.set_result(MANIFEST)

    saves = SaveQueue(fail, lambda handle, _: pytest.fail("begun"), lambda step, over: None)
    with caplog.at_level(logging.INFO, "spotspeed"):
        for step in range(len(causes)):
            saves.submit(replace(TICKET, step=step)).upload_completion.exception(LIMIT_S)
        saves.close()
        saves._thread.join(LIMIT_S)
    lost = [event for event in heard if isinstance(event, events.Lost)]
    assert [event.cause for event in lost] == [cause for cause in causes if cause]
    warned = [record.levelno >= logging.WARNING for record in caplog.records]
    assert warned == [True, False, True, True, True, False]


def test_a_save_that_is_given_up_while_it_is_described_is_not_begun() -> None:
    begun: list[SaveHandle] = []

    def describe(handle: SaveHandle) -> None:
        handle.abandon("nobody waits for it")
        handle.abandon("twice is harmless")

    def begin(handle: SaveHandle, described: object) -> object:
        begun.append(handle)
        return None

    saves = SaveQueue(describe, begin, lambda step, over: None)  # type: ignore[arg-type]
    handle = saves.submit(TICKET)
    with pytest.raises(StorageError, match="nobody waits for it"):
        handle.wait(LIMIT_S)
    assert handle.wait_staged(LIMIT_S) and not begun
    saves.close()
