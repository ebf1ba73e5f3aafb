"""Whatever happens to a frozen object is found in every checkpoint that refers to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spotspeed.checkpoint.catalog import list_sealed
from spotspeed.checkpoint.commit import try_seal
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.shard import ShardWriter
from spotspeed.checkpoint.verify import Seen
from spotspeed.codec import CodecPolicy, digest
from spotspeed.core.chunks import pack
from spotspeed.core.frozen import ObjectRecord, content_of
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Manifest, Ticket, seal_manifest
from spotspeed.errors import CaptureError, CorruptionError, FormatError
from spotspeed.storage.local import LocalStorage

TICKET = Ticket(1, 10, "a", "t", "periodic", 1, 1_700_000_000)
FROZEN, TRAINED = TensorKey("weight", "base"), TensorKey("fp32", "adapter")
VALUES = (np.random.default_rng(3).standard_normal(5000) * 0.02).astype(np.float32)
POLICIES = [CodecPolicy("raw"), CodecPolicy("zstd", 0.01)]


def whole(key: TensorKey, size: int) -> Fragment:
    return Fragment(key, "float32", (size,), Interval(0, size))


def put(writer: ShardWriter, data: bytes) -> None:
    for chunk in writer.layout.chunks:
        writer.put_chunk(chunk.index, data[chunk.raw_offset : chunk.raw_stop])


def freeze(
    storage: LocalStorage, ticket: Ticket, values: np.ndarray[Any, Any], policy: CodecPolicy
) -> ObjectRecord:
    fragment, data = whole(FROZEN, values.size), values.tobytes()
    layout = pack([fragment], chunk_bytes=4096)
    content = content_of([(fragment, digest(data))])
    with ShardWriter(storage, ticket, 0, layout, policy, content=content) as writer:
        put(writer, data)
        return writer.finish_object()


def save(storage: LocalStorage, ticket: Ticket, objects: list[ObjectRecord]) -> Manifest:
    layout = pack([whole(TRAINED, 100)], chunk_bytes=4096)
    with ShardWriter(storage, ticket, 0, layout) as writer:
        put(writer, bytes(400))
        writer.finish(objects)
    manifest = try_seal(storage, ticket)
    assert manifest is not None
    return manifest


@pytest.fixture(params=POLICIES, ids=lambda policy: policy.mode)
def sealed(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[LocalStorage, list[Any], Path]:
    """Two checkpoints that refer to one object, and the object's file."""
    storage = LocalStorage(tmp_path)
    record = freeze(storage, TICKET, VALUES, request.param)
    manifests = [save(storage, replace(TICKET, step=step), [record]) for step in (10, 20)]
    return storage, manifests, tmp_path / record.path


def assert_found(storage: LocalStorage, manifests: list[Manifest], path: Path) -> None:
    for manifest in manifests:
        damages = CheckpointReader(storage, manifest).find_damage().damages
        assert damages and all(path.name in str(damage) for damage in damages)
        reader = CheckpointReader(storage, manifest)
        try:
            found = reader.read_tensor(FROZEN)
        except CorruptionError as error:
            assert path.name in str(error)
        else:
            assert found.tobytes() == VALUES.tobytes(), "damaged bytes were handed out"


def test_the_undamaged_object_is_read_through_both(sealed):
    storage, manifests, _ = sealed
    for manifest in manifests:
        reader = CheckpointReader(storage, manifest)
        assert reader.verify().files == 4
        assert reader.read_tensor(FROZEN).tobytes() == VALUES.tobytes()


def test_verifying_several_checkpoints_reads_their_common_object_once(sealed):
    storage, manifests, path = sealed
    seen: Seen = {}
    first, second = (CheckpointReader(storage, m).find_damage(seen) for m in manifests)
    size = path.stat().st_size
    assert first.bytes_read == second.bytes_read + size
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    seen = {}
    for manifest in manifests:
        assert len(CheckpointReader(storage, manifest).find_damage(seen).damages) == 1
    assert [info.object_bytes for info in list_sealed(storage)] == [size, size]


def test_a_flip_cut_tail_or_hole_anywhere_is_found(sealed):
    storage, manifests, path = sealed
    data = path.read_bytes()
    size = len(data)
    for offset in [*range(0, 90, 7), *range(90, size - 200, 997), *range(size - 200, size, 13)]:
        flipped = bytearray(data)
        flipped[offset] ^= 1 << offset % 8
        path.write_bytes(flipped)
        assert_found(storage, manifests, path)
    for length in (0, 1, 4096, size // 2, size - 64, size - 1):
        path.write_bytes(data[:length])
        assert_found(storage, manifests, path)
    for tail in (b"\0", b"garbage" * 999):
        path.write_bytes(data + tail)
        assert_found(storage, manifests, path)
    for start in range(0, size, 4096):
        path.write_bytes(
            data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :]
        )
        assert_found(storage, manifests, path)
    path.unlink()
    assert_found(storage, manifests, path)
    path.write_bytes(data)
    assert all(CheckpointReader(storage, manifest).verify() for manifest in manifests)


def test_an_object_with_other_values_under_this_name_is_found(sealed, tmp_path):
    storage, manifests, path = sealed
    other = freeze(storage, replace(TICKET, step=15), VALUES + 1, CodecPolicy("raw"))
    path.write_bytes((tmp_path / other.path).read_bytes())
    assert_found(storage, manifests, path)


def test_an_object_that_many_ranks_list_is_opened_once_and_refused(tmp_path, counting):
    storage, ranks = LocalStorage(tmp_path), 8
    record = freeze(storage, TICKET, VALUES, CodecPolicy("raw"))
    ticket = replace(TICKET, step=12, world_size=ranks)
    receipts = {}
    for rank in range(ranks):
        with ShardWriter(storage, ticket, rank, pack([], chunk_bytes=4096)) as writer:
            writer.finish([record])
        receipts[rank] = storage.get(ticket.receipt_path(rank), 1 << 16)
    manifest, data = seal_manifest(ticket, receipts)
    storage.put(ticket.manifest_path, data)
    for read in (lambda r: r.tensors(), lambda r: r.verify()):
        counted = counting(storage)
        with pytest.raises(FormatError, match="listed by rank 0 and by rank 1"):
            read(CheckpointReader(counted, manifest))
        read_bytes = sum(size for key, size in counted.reads if key == record.path)
        assert read_bytes <= record.size_bytes


def test_the_writer_refuses_other_bytes_than_were_announced(tmp_path):
    storage = LocalStorage(tmp_path)
    layout = pack([whole(FROZEN, 2000)], chunk_bytes=4096)
    content = content_of([(whole(FROZEN, 2000), digest(bytes(8000)))])
    writer = ShardWriter(storage, TICKET, 0, layout, content=content)
    with pytest.raises(CaptureError, match="changed while they were being staged"), writer:
        put(writer, bytes(7999) + b"\1")
        writer.finish_object()
    assert storage.list() == []


def test_a_save_whose_object_is_gone_or_whose_parts_do_not_fit_is_not_sealed(tmp_path):
    storage = LocalStorage(tmp_path)
    record = freeze(storage, TICKET, VALUES, CodecPolicy("raw"))
    (tmp_path / record.path).unlink()
    with pytest.raises(CorruptionError, match=rf"{record.path}: missing"):
        save(storage, TICKET, [record])
    assert not (tmp_path / TICKET.manifest_path).exists()
    part = Fragment(FROZEN, "float32", (5000,), Interval(0, 4999))
    layout = pack([part], chunk_bytes=4096)
    ticket = replace(TICKET, step=11)
    with ShardWriter(storage, ticket, 0, layout) as writer:
        put(writer, VALUES.tobytes()[:-4].ljust(layout.raw_bytes, b"\0"))
        writer.finish()
    with pytest.raises(CorruptionError, match="do not fit together"):
        try_seal(storage, ticket)
    assert not (tmp_path / ticket.manifest_path).exists()
