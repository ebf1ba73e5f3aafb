"""Any layout reads back what any layout wrote, and reads little more than it needs."""

from __future__ import annotations

import numpy as np
import pytest

from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.codec import CodecPolicy
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.errors import FormatError, InvalidLayoutError, ObjectNotFoundError

POLICIES = [CodecPolicy("raw"), CodecPolicy("zstd", 0.01), CodecPolicy("sampled", 0.08)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.mode)
@pytest.mark.parametrize("written_by,read_by", [(1, 1), (1, 4), (3, 2), (5, 7), (4, 1)])
def test_every_layout_reads_what_every_layout_wrote(
    checkpoint_factory, zero_split, policy, written_by, read_by
):
    written = checkpoint_factory(written_by, policy=policy)
    reader = CheckpointReader(written.storage, written.manifest)
    for fragments in zero_split(written.tensors, read_by):
        requests = [(fragment, bytearray(fragment.size_bytes)) for fragment in fragments]
        report = reader.read_into(requests)
        assert report.bytes_wanted == sum(fragment.size_bytes for fragment in fragments)
        for fragment, buffer in requests:
            assert bytes(buffer) == written.bytes_of(fragment), fragment


def test_the_tensors_are_listed_with_dtype_and_shape(checkpoint_factory):
    written = checkpoint_factory(3)
    stored = CheckpointReader(written.storage, written.manifest).tensors()
    assert {key: (item.dtype, item.shape) for key, item in stored.items()} == {
        key: (dtype, array.shape) for key, (dtype, array) in written.tensors.items()
    }


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.mode)
def test_a_large_tensor_is_read_straight_into_its_target(checkpoint_factory, policy):
    values = np.random.default_rng(1).standard_normal(3 * 1024 * 1024).astype(np.float32)
    key = TensorKey("fp32", "w")
    written = checkpoint_factory(
        2, tensors={key: ("float32", values)}, policy=policy, chunk_bytes=1 << 20
    )
    reader = CheckpointReader(written.storage, written.manifest)
    out = np.empty(values.size - 5, np.float32)
    fragment = Fragment(key, "float32", values.shape, Interval(2, values.size - 3))
    report = reader.read_into([(fragment, memoryview(out).cast("B"))])
    assert np.array_equal(out.view(np.uint32), values[2:-3].view(np.uint32))
    assert report.reads < report.chunks


def test_bytes_read_stay_within_five_percent_of_what_is_needed(
    checkpoint_factory, zero_split, model_tensors, counting
):
    tensors = {
        TensorKey(kind, name): value
        for kind in ("fp32", "exp_avg", "exp_avg_sq")
        for name, value in {
            f"layers.{n}.weight": ("float32", np.full((512, 512 + n), n, np.float32))
            for n in range(12)
        }.items()
    }
    written = checkpoint_factory(4, tensors=tensors, chunk_bytes=32 * 1024)
    for read_by in (2, 3, 4):
        store = counting(written.storage)
        needed = 0
        for fragments in zero_split(tensors, read_by):
            reader = CheckpointReader(store, written.manifest)
            requests = [(fragment, bytearray(fragment.size_bytes)) for fragment in fragments]
            report = reader.read_into(requests)
            needed += report.bytes_wanted
        assert needed == sum(array.nbytes for _, array in tensors.values())
        assert store.bytes_read <= 1.05 * needed, (read_by, store.bytes_read / needed)


def test_adjacent_chunks_share_one_read(checkpoint_factory, zero_split, counting):
    written = checkpoint_factory(1, chunk_bytes=4096)
    store = counting(written.storage)
    reader = CheckpointReader(store, written.manifest)
    reader.tensors()
    opened = len(store.reads)
    [fragments] = zero_split(written.tensors, 1)
    report = reader.read_into([(f, bytearray(f.size_bytes)) for f in fragments])
    assert report.chunks > 10
    assert len(store.reads) - opened == report.reads == 1


def test_one_tensor_comes_as_numpy_in_its_shape_and_in_part(checkpoint_factory):
    written = checkpoint_factory(3)
    reader = CheckpointReader(written.storage, written.manifest)
    key = TensorKey("exp_avg", "layers.10.weight")
    values = written.tensors[key][1]
    assert np.array_equal(reader.read_tensor(key), values)
    assert np.array_equal(reader.read_tensor(key, 5, 500), values.reshape(-1)[5:500])
    assert reader.read_tensor(TensorKey("step", "norm.scale")).shape == ()
    assert reader.read_tensor(TensorKey("weight", "empty")).shape == (0, 4)
    with pytest.raises(InvalidLayoutError, match="elements"):
        reader.read_tensor(key, 5, values.size + 1)
    with pytest.raises(InvalidLayoutError, match="nothing"):
        reader.read_tensor(TensorKey("fp32", "nothing"))


def test_bfloat16_comes_as_float32_exactly(checkpoint_factory):
    written = checkpoint_factory(2)
    key = TensorKey("weight", "frozen.weight")
    array = CheckpointReader(written.storage, written.manifest).read_tensor(key)
    assert array.dtype == np.float32
    assert np.array_equal(array.view(np.uint32) >> 16, written.tensors[key][1])
    assert not np.any(array.view(np.uint32) & 0xFFFF)


def test_blobs_are_bytes(checkpoint_factory):
    written = checkpoint_factory(2)
    reader = CheckpointReader(written.storage, written.manifest)
    key = TensorKey("blob", "job")
    assert reader.blob(key) == written.tensors[key][1].tobytes()
    with pytest.raises(FormatError, match="nothing"):
        reader.blob(TensorKey("blob", "nothing"))


def test_what_does_not_fit_is_named_before_anything_is_read(checkpoint_factory):
    written = checkpoint_factory(2)
    reader = CheckpointReader(written.storage, written.manifest)
    wrong = Fragment(TensorKey("fp32", "norm.scale"), "float32", (2,), Interval(0, 2))
    with pytest.raises(InvalidLayoutError, match=r"norm\.scale stored \[1\], wanted \[2\]"):
        reader.read_into([(wrong, bytearray(8))])


def test_a_buffer_of_another_size_or_read_only_is_refused(checkpoint_factory):
    written = checkpoint_factory(2)
    reader = CheckpointReader(written.storage, written.manifest)
    fragment = written.fragment(TensorKey("fp32", "norm.scale"))
    with pytest.raises(ValueError, match="4 writable bytes"):
        reader.read_into([(fragment, bytearray(5))])
    with pytest.raises(ValueError, match="read-only"):
        reader.read_into([(fragment, memoryview(bytes(4)))])


def test_a_directory_without_manifest_is_no_checkpoint(checkpoint_factory):
    written = checkpoint_factory(2)
    directory = written.ticket.directory
    reader = CheckpointReader.open(written.storage, directory, digest=written.manifest.digest)
    assert reader.manifest == written.manifest
    written.storage.delete(written.ticket.manifest_path)
    with pytest.raises(ObjectNotFoundError):
        CheckpointReader.open(written.storage, directory)


def test_verifying_a_whole_checkpoint_reads_every_byte(checkpoint_factory, counting):
    written = checkpoint_factory(3, policy=CodecPolicy("zstd", 0.01))
    store = counting(written.storage)
    report = CheckpointReader(store, written.manifest).verify()
    assert report.is_whole and report.files == 7
    sizes = {info.key: info.size_bytes for info in written.storage.list()}
    read = dict.fromkeys(sizes, 0)
    for key, size in store.reads:
        read[key] += size
    assert read == sizes
