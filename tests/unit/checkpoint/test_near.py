"""A restore reads from the node's disk exactly the chunks that verify there."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.codec import CodecPolicy
from spotspeed.core.layout import TensorKey
from spotspeed.storage.local import LocalStorage

POLICIES = [CodecPolicy("raw"), CodecPolicy("zstd", 0.01)]


@pytest.fixture(params=POLICIES, ids=lambda policy: policy.mode)
def written(checkpoint_factory, request):
    return checkpoint_factory(3, policy=request.param)


def node_with(written, place, *ranks):
    """A node's tier that holds these ranks' parts and no manifest."""
    directory = place / written.ticket.directory
    directory.mkdir(parents=True)
    for rank in ranks:
        for key in (written.ticket.shard_path(rank), written.ticket.receipt_path(rank)):
            shutil.copy(written.file(key), place / key)
    return LocalStorage(place)


def read_all(written, counting, near):
    """Everything, compared with what was written; the reader, and what the far store gave."""
    far = counting(written.storage)
    reader = CheckpointReader(far, written.manifest, near=near)
    requests = [(written.fragment(key), bytearray(array.nbytes))
                for key, (_, array) in written.tensors.items()]  # fmt: skip
    reader.read_into(requests)
    for fragment, buffer in requests:
        assert bytes(buffer) == written.bytes_of(fragment), fragment
    return reader, [(key, size) for key, size in far.reads]


def test_what_this_node_wrote_is_not_read_from_far_away(written, counting, tmp_path):
    near = node_with(written, tmp_path / "node", 0, 2)
    reader, far = read_all(written, counting, near)
    assert {key for key, _ in far} == {
        written.ticket.shard_path(1), written.ticket.receipt_path(1)
    }  # fmt: skip
    assert reader.near.bytes_read > 0 and reader.near.refused == 0


def test_a_node_that_wrote_nothing_of_it_reads_everything_from_far_away(
    written, counting, tmp_path
):
    reader, far = read_all(written, counting, LocalStorage(tmp_path / "node"))
    assert len({key for key, _ in far}) == 6
    assert reader.near.bytes_read == reader.near.refused == 0


def test_one_damaged_chunk_is_the_only_one_read_from_far_away(written, counting, tmp_path):
    near = node_with(written, tmp_path / "node", 0, 1, 2)
    shard = tmp_path / "node" / written.ticket.shard_path(1)
    data = bytearray(shard.read_bytes())
    data[3 * 4096 + 5] ^= 1
    shard.write_bytes(data)
    reader, far = read_all(written, counting, near)
    assert [key for key, _ in far] == [written.ticket.shard_path(1)]
    assert reader.near.refused == 1
    assert sum(size for _, size in far) <= 4096


def test_of_a_shard_cut_short_the_part_that_is_left_is_used(written, counting, tmp_path):
    near = node_with(written, tmp_path / "node", 0, 1, 2)
    shard = tmp_path / "node" / written.ticket.shard_path(1)
    whole = shard.stat().st_size
    with open(shard, "r+b") as file:
        file.truncate(4 * 4096)
    reader, far = read_all(written, counting, near)
    assert reader.near.refused > 0
    assert 0 < sum(size for key, size in far if key == written.ticket.shard_path(1)) < whole
    assert {key for key, _ in far} == {
        written.ticket.shard_path(1), written.ticket.receipt_path(1)
    }  # fmt: skip


def test_the_parts_of_another_save_under_the_same_name_are_refused(
    checkpoint_factory, model_tensors, counting, tmp_path
):
    written, other = checkpoint_factory(3), checkpoint_factory(3, tensors=model_tensors(1))
    near = node_with(other, tmp_path / "node", 0, 1, 2)
    reader, _ = read_all(written, counting, near)
    assert reader.near.refused > 0


def test_a_large_tensor_that_is_damaged_here_is_mended_in_place(
    checkpoint_factory, counting, tmp_path
):
    values = np.random.default_rng(1).standard_normal(3 << 20).astype(np.float32)
    tensors = {TensorKey("fp32", "w"): ("float32", values)}
    written = checkpoint_factory(1, tensors=tensors, chunk_bytes=1 << 20)
    near = node_with(written, tmp_path / "node", 0)
    with open(tmp_path / "node" / written.ticket.shard_path(0), "r+b") as file:
        file.seek(4096 + (5 << 20))
        file.write(b"damage")
    reader, far = read_all(written, counting, near)
    assert far == [(written.ticket.shard_path(0), 1 << 20)]
    assert reader.near.bytes_read == values.nbytes - (1 << 20)
