"""Stores one rank's part of a save: encodes a few chunks ahead, writes in order, may repeat."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from spotspeed.agent.arena import SlotArena
from spotspeed.agent.incoming import IncomingSave, StoppedError
from spotspeed.agent.ledger import SlotLedger
from spotspeed.checkpoint.shard import EncodedChunk, ShardWriter
from spotspeed.codec import CodecPolicy
from spotspeed.errors import StorageError
from spotspeed.storage.contract import Storage

LOOKAHEAD = 4
"""Chunks encoded ahead of the one being written."""
RETRY_S = 5.0
"""How long a failing store is tried again while the rank lives and its chunks are in memory."""
ORPHAN_RETRY_S = 60.0
"""The same when the rank is gone: nobody else can save this state any more."""
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_logger = logging.getLogger("spotspeed")


@dataclass(frozen=True, slots=True)
class Workshop:
    """What storing needs besides the save: the store, the chunks' memory, threads to encode."""

    storage: Storage
    arena: SlotArena
    ledger: SlotLedger
    encoders: ThreadPoolExecutor
    is_orphaned: Callable[[], bool]


def encoder_threads() -> int:
    """Threads that encode chunks, for all ranks of the node together."""
    return max(1, min(4, len(os.sched_getaffinity(0)) // 2))


def store(save: IncomingSave, workshop: Workshop) -> None:
    """Write shard and receipt; both are durable on return.

    A failed attempt is repeated as long as all chunks are still in memory. Raises StoppedError
    when the save was abandoned or cut short, StorageError when the store keeps failing; then
    nothing of it is left but what a crashed store could not remove.
    """
    first_failure: float | None = None
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            _store_once(save, workshop)
            return
        except StoppedError:
            raise
        except StorageError as error:
            now = time.monotonic()
            first_failure = now if first_failure is None else first_failure
            limit_s = ORPHAN_RETRY_S if workshop.is_orphaned() else RETRY_S
            if not workshop.ledger.is_repeatable(save.number):
                raise StorageError(
                    f"{error} (not tried again: a part of the state had already been written and "
                    f"its staging memory given back)"
                ) from error
            if now - first_failure + pause_s > limit_s:
                raise
            _logger.warning("%s: %s; trying again in %.1f s", save, error, pause_s)
            save.pause(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _store_once(save: IncomingSave, workshop: Workshop) -> None:
    policy = _policy(save, workshop.storage)
    save.progress.written_bytes = 0
    ahead: deque[tuple[int, Future[EncodedChunk]]] = deque()
    with ShardWriter(workshop.storage, save.ticket, save.rank, save.layout, policy) as writer:
        try:
            for chunk in save.layout.chunks:
                _encode_ahead(save, workshop, writer, ahead, chunk.index)
                slot, encoding = ahead.popleft()
                writer.put(encoding.result())
                save.progress.written_bytes = chunk.raw_stop
                workshop.ledger.written(slot)
        finally:
            # The encoders read slots that are given back once this save is settled.
            wait([encoding for _, encoding in ahead])
        save.wait_end()
        writer.finish()


def _encode_ahead(
    save: IncomingSave,
    workshop: Workshop,
    writer: ShardWriter,
    ahead: deque[tuple[int, Future[EncodedChunk]]],
    index: int,
) -> None:
    """Keep up to LOOKAHEAD chunks from `index` on being encoded; waits only for the first."""
    stop = min(index + LOOKAHEAD, len(save.layout.chunks))
    for number in range(index + len(ahead), stop):
        slot = save.slot(number, wait=number == index)
        if slot is None:
            return
        view = workshop.arena.view(slot, save.layout.chunks[number].size_bytes)
        ahead.append((slot, workshop.encoders.submit(writer.encode, number, view)))


def _policy(save: IncomingSave, storage: Storage) -> CodecPolicy:
    is_local = "://" not in storage.url
    match save.compression:
        case "zstd":
            return CodecPolicy.choose("zstd", is_local=is_local)
        case "none":
            return CodecPolicy.choose("none", is_local=is_local)
        case _:
            return CodecPolicy.choose(None, is_local=is_local)
