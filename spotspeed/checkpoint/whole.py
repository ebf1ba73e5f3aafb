"""Writes tensors that one process holds as a sealed checkpoint of one rank."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from spotspeed.checkpoint.catalog import Catalog, scan
from spotspeed.checkpoint.commit import try_seal
from spotspeed.checkpoint.ownership import claim_epoch, record_restored_from, release
from spotspeed.checkpoint.shard import ShardWriter
from spotspeed.core.chunks import StreamLayout, choose_chunk_bytes, pack
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Manifest, Ticket
from spotspeed.errors import ConfigError, CorruptionError
from spotspeed.storage.contract import Storage

ATTEMPT = "imported"
Held = tuple[Fragment, memoryview]
"""A fragment and exactly its bytes."""


def blob(key: TensorKey, data: bytes) -> Held:
    """Plain data as the tensor that it is stored as."""
    fragment = Fragment(key, "uint8", (len(data),), Interval(0, len(data)))
    return fragment, memoryview(data)


def write_whole(
    storage: Storage, tensors: Sequence[Held], *, tag: str, step: int, replaces: bool = False
) -> Manifest:
    """Claim the path, store `tensors` as a checkpoint, seal it. Memory: one chunk.

    Beside others that were written so it is one more of the same history. To a path with
    checkpoints of a run it goes only when it `replaces` them: the next launch begins from it, and
    removes those that nobody saved by name once it has sealed something.

    Raises ConfigError for a path with a run's checkpoints, OwnedError when a job is alive there,
    InvalidLayoutError when fragments overlap.
    """
    catalog = scan(storage)
    if not replaces:
        _refuse_run(storage, catalog)
    fragments = [fragment for fragment, _ in tensors]
    total = sum(fragment.size_bytes for fragment in fragments)
    layout = pack(fragments, chunk_bytes=choose_chunk_bytes(total))
    epoch = claim_epoch(storage).epoch
    try:
        if replaces or not catalog.sealed:
            record_restored_from(storage, epoch, None)
            at = epoch
        else:
            at = _epoch_beside(catalog, step, epoch)
        ticket = Ticket(at, step, ATTEMPT, tag, "explicit", 1, int(time.time()))
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


def _refuse_run(storage: Storage, catalog: Catalog) -> None:
    own = [info for info in catalog.sealed if not info.directory.endswith(f".{ATTEMPT}")]
    if own:
        raise ConfigError(
            f"{storage.url} holds {len(own)} checkpoints of a run, the newest {own[0].tag!r} (step "
            f"{own[0].step}): a launch after this would begin from what is written now, and remove "
            f"them. Give a path of its own, or say --replace if that is what you want"
        )


def _epoch_beside(catalog: Catalog, step: int, claimed: int) -> int:
    """Where it stands: with the others, so that the highest step is the newest of them.

    Another one of a step that is there has the claimed epoch to itself, and is the newest.
    """
    epoch = catalog.sealed[0].epoch
    directory = Ticket(epoch, step, ATTEMPT, "t", "explicit", 1, 0).directory
    known = {info.directory for info in (*catalog.sealed, *catalog.off_lineage)}
    known |= {*catalog.unsealed, *(item.directory for item in catalog.damaged)}
    return claimed if directory in known else epoch


def _bytes_of(layout: StreamLayout, data: Mapping[int, memoryview], index: int) -> bytearray:
    filled = bytearray(layout.chunks[index].size_bytes)
    for part in layout.segments(index):
        source = data[part.entry][part.source_offset : part.source_offset + part.size_bytes]
        filled[part.chunk_offset : part.chunk_offset + part.size_bytes] = source
    return filled
