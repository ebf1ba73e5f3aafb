"""Writes tensors that one process holds as a sealed checkpoint of one rank."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from spotspeed.checkpoint.commit import try_seal
from spotspeed.checkpoint.ownership import claim_epoch, record_restored_from, release
from spotspeed.checkpoint.shard import ShardWriter
from spotspeed.core.chunks import StreamLayout, choose_chunk_bytes, pack
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Manifest, Ticket
from spotspeed.errors import CorruptionError
from spotspeed.storage.contract import Storage

ATTEMPT = "imported"
Held = tuple[Fragment, memoryview]
"""A fragment and exactly its bytes."""


def blob(key: TensorKey, data: bytes) -> Held:
    """Plain data as the tensor that it is stored as."""
    fragment = Fragment(key, "uint8", (len(data),), Interval(0, len(data)))
    return fragment, memoryview(data)


def write_whole(storage: Storage, tensors: Sequence[Held], *, tag: str, step: int) -> Manifest:
    """Claim an epoch that begins with nothing, store `tensors` as its first checkpoint, seal it.

    What was at the path before is off the lineage from then on, and stays. Memory: one chunk.
    Raises OwnedError when a job is alive there, InvalidLayoutError when fragments overlap.
    """
    fragments = [fragment for fragment, _ in tensors]
    total = sum(fragment.size_bytes for fragment in fragments)
    layout = pack(fragments, chunk_bytes=choose_chunk_bytes(total))
    epoch = claim_epoch(storage).epoch
    try:
        record_restored_from(storage, epoch, None)
        ticket = Ticket(epoch, step, ATTEMPT, tag, "explicit", 1, int(time.time()))
        with ShardWriter(storage, ticket, 0, layout) as writer:
            data = {number: tensors[source][1] for number, source in enumerate(layout.sources)}
            for chunk in layout.chunks:
                writer.put_chunk(chunk.index, _bytes_of(layout, data, chunk.index))
            writer.finish()
        manifest = try_seal(storage, ticket)
    finally:
        release(storage, epoch)
    if manifest is None:
        raise CorruptionError(f"{storage.url}/{ticket.directory}: the receipt is gone again")
    return manifest


def _bytes_of(layout: StreamLayout, data: Mapping[int, memoryview], index: int) -> bytearray:
    filled = bytearray(layout.chunks[index].size_bytes)
    for part in layout.segments(index):
        source = data[part.entry][part.source_offset : part.source_offset + part.size_bytes]
        filled[part.chunk_offset : part.chunk_offset + part.size_bytes] = source
    return filled
