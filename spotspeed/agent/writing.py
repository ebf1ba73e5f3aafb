"""Stores one rank's part of a save: encodes a few chunks ahead, writes in order, may repeat."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol, TypeVar

from spotspeed.agent.arena import SlotArena
from spotspeed.agent.choosing import Chooser, Waits
from spotspeed.agent.incoming import IncomingSave, StoppedError
from spotspeed.agent.ledger import SlotLedger
from spotspeed.agent.metering import Meter
from spotspeed.agent.node_tier import NodeSink, NodeTier
from spotspeed.checkpoint.shard import EncodedChunk, ShardWriter
from spotspeed.checkpoint.tiers import NodePart
from spotspeed.codec import CodecPolicy
from spotspeed.core.chunks import StreamLayout
from spotspeed.core.frozen import ObjectRecord, object_path
from spotspeed.core.manifest import Receipt
from spotspeed.errors import CorruptionError, ObjectNotFoundError, SpotSpeedError, StorageError
from spotspeed.storage.contract import Storage

RUN_BYTES = 1024 * 1024
"""Chunks that follow each other are encoded and written together up to about this size.

Effect: 53 MB in chunks of 256 KiB take a third less processor time, most of which is what it takes
two threads to hand each other a chunk and a disk to be asked for it.
"""
LOOKAHEAD = 4
"""Runs encoded ahead of the one being written."""
RETRY_S = 5.0
"""How long a failing store is tried again while the chunks are in memory and somebody waits."""
LONG_RETRY_S = 60.0
"""The same where nobody does: the rank is gone, or goes on and has not begun a newer save."""
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
T = TypeVar("T")
_logger = logging.getLogger("spotspeed")


@dataclass(frozen=True, slots=True)
class Workshop:
    """What storing needs besides the save: the store, the chunks' memory, threads to encode.

    With a `tier`, the part is written there, and only what that does not take to the store, which
    `on_bypass` is told.
    """

    storage: Storage
    arena: SlotArena
    ledger: SlotLedger
    encoders: ThreadPoolExecutor
    retry_s: Callable[[IncomingSave], float]
    """How long a failing store is tried again, asked anew each time."""
    chooser: Chooser
    tier: NodeTier | None = None
    on_bypass: Callable[[IncomingSave, str], None] = lambda save, cause: None


def encoder_threads() -> int:
    """Threads that encode chunks, for all ranks of the node together."""
    return max(1, min(4, len(os.sched_getaffinity(0)) // 2))


def store(save: IncomingSave, workshop: Workshop) -> NodePart | None:
    """Write shard and receipt; both are durable on return.

    Returns the part when that is on this node only, None when it is at the store. A failed attempt
    is repeated as long as all chunks are still in memory. Raises StoppedError when the save was
    abandoned or cut short, StorageError when the store keeps failing; then nothing of it is left
    but what a crashed store could not remove.
    """
    try:
        return _store(save, workshop)
    except SpotSpeedError:
        _discard_objects(save, workshop.storage)
        raise


def _store(save: IncomingSave, workshop: Workshop) -> NodePart | None:
    with contextlib.ExitStack() as stack:
        node = None
        if workshop.tier is not None and not save.is_direct:
            try:
                node = stack.enter_context(workshop.tier.sink(save))
            except StorageError as error:
                _bypass(save, workshop, error)
        if node is not None:
            try:
                return _store_once(save, workshop, node)
            except StoppedError:
                raise
            except StorageError as error:
                if not workshop.ledger.is_repeatable(save.number):
                    raise
                _bypass(save, workshop, error)
    _store_remote(save, workshop)
    return None


def _store_remote(save: IncomingSave, workshop: Workshop) -> None:
    first_failure: float | None = None
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            _store_once(save, workshop, None)
            return
        except StoppedError:
            raise
        except StorageError as error:
            now = time.monotonic()
            first_failure = now if first_failure is None else first_failure
            if not workshop.ledger.is_repeatable(save.number):
                raise StorageError(
                    f"{error} (not tried again: a part of the state had already been written and "
                    f"its staging memory given back)"
                ) from error
            if now - first_failure + pause_s > workshop.retry_s(save):
                raise
            _logger.warning("%s: %s; trying again in %.1f s", save, error, pause_s)
            save.pause(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


class _Writing:
    """A shard being written to the tier, or to the store when there is none or it fails."""

    def __init__(
        self, writer: ShardWriter, node: NodeSink | None, save: IncomingSave, workshop: Workshop
    ) -> None:
        self.writer, self.node = writer, node
        self._save, self._workshop = save, workshop
        is_remote = node is None and "://" in workshop.storage.url
        self.meter = Meter(encoder_threads(), is_side_by_side=is_remote)

    def encode_all(self, first: int, views: Sequence[memoryview]) -> list[EncodedChunk]:
        return self.meter.encoding(self.writer.encode_all, first, views)

    def put_all(self, chunks: Sequence[EncodedChunk]) -> None:
        self._insist(lambda: self.meter.writing(self.writer.put_all, chunks))

    def finish(self) -> Receipt:
        objects = self._save.objects or ()
        return self._insist(lambda: self.meter.writing(self.writer.finish, objects))

    def _insist(self, call: Callable[[], T]) -> T:
        """`call`, once more after a move to the store when the tier fails in it."""
        try:
            return call()
        except StorageError as error:
            if self.node is None:
                raise
            node, self.node = self.node, None
            _bypass(self._save, self._workshop, error)
            try:
                self.writer.move(self._workshop.storage, node.read_back)
            except CorruptionError as damage:
                raise StorageError(f"{error}; and it cannot be read back: {damage}") from damage
            node.discard(self._save.rank)
            return call()


def _store_once(save: IncomingSave, workshop: Workshop, node: NodeSink | None) -> NodePart | None:
    policy = _policy(save, workshop)
    save.progress.written_bytes = 0
    if save.objects is None:
        save.objects = (*_store_objects(save, workshop, policy), *save.referred)
    if node is None:
        _check_referred(save, workshop.storage)
    sink = workshop.storage if node is None else node
    with (
        ShardWriter(sink, save.ticket, save.rank, save.parts[-1], policy) as writer,
        workshop.chooser.writing() as waits,
    ):
        writing = _Writing(writer, node, save, workshop)
        first = len(save.layout.chunks) - len(save.parts[-1].chunks)
        for raw_stop in _put_chunks(save, workshop, writing, (writer.layout, first), waits):
            if writing.node is None:
                save.progress.written_bytes = raw_stop
        save.wait_end()
        save.is_promised = True
        receipt = writing.finish()
        if node is None:
            is_encoded = policy.mode != "raw"
            workshop.chooser.saw(waits, writing.meter, receipt.shard, is_encoded=is_encoded)
    if writing.node is node:
        save.cost = writing.meter.cost(save.number, receipt, is_near=node is not None)
    if writing.node is None:
        return None
    writing.node.is_kept = True
    return NodePart(receipt)


def _bypass(save: IncomingSave, workshop: Workshop, error: StorageError) -> None:
    _logger.warning("%s goes straight to the store: %s", save, error)
    workshop.on_bypass(save, str(error))


def _store_objects(
    save: IncomingSave, workshop: Workshop, policy: CodecPolicy
) -> Iterator[ObjectRecord]:
    """Write the frozen objects of a save, at the store itself, one after the other."""
    first = 0
    for item, layout in zip(save.new_objects, save.parts[:-1], strict=True):
        with ShardWriter(
            workshop.storage, save.ticket, save.rank, layout, policy, content=item.content
        ) as writer:
            for raw_stop in _put_chunks(save, workshop, writer, (layout, first), Waits()):
                save.progress.written_bytes = raw_stop
            yield writer.finish_object()
        first += len(layout.chunks)


def _check_referred(save: IncomingSave, storage: Storage) -> None:
    """Raise CorruptionError when a frozen object that is not written again is not there."""
    for item in save.referred:
        try:
            found = storage.size(item.path)
        except ObjectNotFoundError:
            found = -1
        if found != item.size_bytes:
            state = "is gone" if found < 0 else f"has {found} bytes instead of {item.size_bytes}"
            raise CorruptionError(
                f"{storage.url}/{item.path}: this frozen object {state}; the next save writes "
                f"the weights again"
            )


def _discard_objects(save: IncomingSave, storage: Storage) -> None:
    """Remove what a failed save has written of its own; nobody can refer to it."""
    if not save.is_promised:
        for item in save.new_objects:
            with contextlib.suppress(StorageError):
                storage.delete(object_path(save.ticket.directory, item.content))


class Press(Protocol):
    """Makes chunks of slots, on any thread, and puts them into a file, in order."""

    def encode_all(self, first: int, views: Sequence[memoryview], /) -> list[EncodedChunk]: ...

    def put_all(self, chunks: Sequence[EncodedChunk], /) -> None: ...


def _put_chunks(
    save: IncomingSave,
    workshop: Workshop,
    press: Press,
    file: tuple[StreamLayout, int],
    waits: Waits,
) -> Iterator[int]:
    """Encode and put a file's chunks: its layout, and the number of its first in the save.

    Yields, after each, how far the save's raw stream is written.
    """
    ahead: deque[tuple[list[int], Future[list[EncodedChunk]]]] = deque()
    layout, first = file
    try:
        index, stop = first, first + len(layout.chunks)
        while index < stop:
            with waits.for_chunks():
                _encode_ahead(save, workshop, press.encode_all, ahead, (first, index, stop))
            slots, encoding = ahead.popleft()
            with waits.for_encoders():
                chunks = encoding.result()
            press.put_all(chunks)
            workshop.ledger.written(slots)
            index += len(slots)
            yield save.layout.chunks[index - 1].raw_stop
    finally:
        # The encoders read slots that are given back once this save is settled.
        wait([encoding for _, encoding in ahead])


def _encode_ahead(
    save: IncomingSave,
    workshop: Workshop,
    encode: Callable[[int, Sequence[memoryview]], list[EncodedChunk]],
    ahead: deque[tuple[list[int], Future[list[EncodedChunk]]]],
    at: tuple[int, int, int],
) -> None:
    """Keep up to LOOKAHEAD runs being encoded; waits only for the first chunk of the first.

    `at` are numbers in the save: the file's first chunk, the one to be put next, and the file's
    end.
    """
    first, index, end = at
    number = index + sum(len(slots) for slots, _ in ahead)
    while number < end and len(ahead) < LOOKAHEAD:
        slots = _run(save, number, end, wait=not ahead)
        if not slots:
            return
        views = [workshop.arena.view(slot, save.layout.chunks[chunk].size_bytes)
                 for chunk, slot in enumerate(slots, number)]  # fmt: skip
        ahead.append((slots, workshop.encoders.submit(encode, number - first, views)))
        number += len(slots)


def _run(save: IncomingSave, number: int, end: int, *, wait: bool) -> list[int]:
    """The slots of the chunks from `number` on that have come, RUN_BYTES of them or a few more."""
    slots: list[int] = []
    size_bytes = 0
    while number + len(slots) < end and size_bytes < RUN_BYTES:
        slot = save.slot(number + len(slots), wait=wait and not slots)
        if slot is None:
            break
        size_bytes += save.layout.chunks[number + len(slots)].size_bytes
        slots.append(slot)
    return slots


def _policy(save: IncomingSave, workshop: Workshop) -> CodecPolicy:
    """Chunks are encoded once, for the store: that is where they go in the end."""
    match save.compression:
        case "zstd":
            return CodecPolicy.choose("zstd", is_worth=True)
        case "none":
            return CodecPolicy.choose("none", is_worth=False)
        case _:
            speed = None if workshop.tier is None else workshop.tier.bytes_per_s
            return CodecPolicy.choose(None, is_worth=workshop.chooser.is_encoded(speed))
