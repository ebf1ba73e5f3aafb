"""Files that vanish, contradict each other or are large; what fails leaves nobody at work."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest
import zstandard

from spotspeed.checkpoint import fetch
from spotspeed.checkpoint.parallel import in_parallel
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.shard import EncodedChunk, ShardWriter
from spotspeed.codec import CodecPolicy, Frame, digest
from spotspeed.core.chunks import MAX_CHUNK_BYTES, pack
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket, seal_manifest
from spotspeed.errors import (
    ChecksumMismatchError,
    CorruptionError,
    FormatError,
    InvalidLayoutError,
    StorageError,
    TransientStorageError,
)
from spotspeed.storage.memory import MemoryStorage

TICKET = Ticket(1, 5, "a", "t", "periodic", 2, 7)
KEY = TensorKey("fp32", "p")


def piece(start, stop, shape=(100,), dtype="float32"):
    return Fragment(KEY, dtype, shape, Interval(start, stop))


def sealed(*shards):
    """A checkpoint in memory whose shard N holds the given fragments, all zero."""
    storage = MemoryStorage("m")
    for rank, fragments in enumerate(shards):
        layout = pack(fragments, chunk_bytes=4096)
        with ShardWriter(storage, TICKET, rank, layout) as writer:
            for chunk in layout.chunks:
                writer.put_chunk(chunk.index, bytes(chunk.size_bytes))
            writer.finish()
    receipts = {rank: storage.get(TICKET.receipt_path(rank), 1 << 16) for rank in range(2)}
    manifest, data = seal_manifest(TICKET, receipts)
    storage.put(TICKET.manifest_path, data)
    return CheckpointReader(storage, manifest)


@pytest.mark.parametrize(
    "first,second",
    [
        (piece(0, 60), piece(50, 100)),
        (piece(0, 50), piece(50, 100, shape=(10, 10))),
        (piece(0, 50), piece(50, 100, dtype="int32")),
    ],
)
def test_sealed_shards_that_contradict_each_other_are_corruption(first, second):
    reader = sealed([first], [second])
    with pytest.raises(FormatError, match="step-000000000005"):
        reader.tensors()
    [damage] = reader.find_damage().damages
    assert "contradict" in str(damage)


def test_a_part_that_no_shard_holds_is_damage_and_only_its_tensor_cannot_be_read():
    other = Fragment(TensorKey("fp32", "q"), "float32", (3,), Interval(0, 3))
    reader = sealed([piece(0, 40), other], [piece(50, 100)])
    [damage] = reader.find_damage().damages
    assert r"no shard holds elements [40, 50) of fp32:p" in str(damage)
    assert reader.read_tensor(other.key).tolist() == [0, 0, 0]
    assert reader.read_tensor(KEY, 50).shape == (50,)
    with pytest.raises(InvalidLayoutError, match=r"fp32:p lacks \[40, 50\)"):
        reader.read_tensor(KEY)


def test_a_shard_that_vanishes_after_it_was_opened_is_corruption(checkpoint_factory):
    written = checkpoint_factory(2)
    reader = CheckpointReader(written.storage, written.manifest)
    reader.tensors()
    written.file(written.ticket.shard_path(1)).unlink()
    with pytest.raises(CorruptionError, match=r"rank-00001\.shard"):
        reader.read_tensor(TensorKey("fp32", "embed.weight"))
        reader.read_tensor(TensorKey("exp_avg_sq", "layers.10.weight"))


@pytest.mark.parametrize("error", [TransientStorageError("try later"), StorageError("no access")])
def test_trouble_of_the_store_is_not_called_corruption(checkpoint_factory, counting, error):
    written = checkpoint_factory(2)

    class Troubled(counting):
        def read_into(self, key, offset, buffer):
            raise error

    reader = CheckpointReader(Troubled(written.storage), written.manifest)
    with pytest.raises(type(error)) as caught:
        reader.tensors()
    assert caught.value is error


@pytest.fixture
def large(checkpoint_factory):
    values = np.random.default_rng(1).standard_normal(5 << 20).astype(np.float32)
    return checkpoint_factory(
        1, tensors={KEY: ("float32", values)}, policy=CodecPolicy("raw"), chunk_bytes=1 << 20
    )


def test_large_raw_runs_are_read_into_the_target_itself_and_verified_there(large, counting):
    out = np.empty(5 << 20, np.float32)
    direct = []

    class Watching(counting):
        def read_into(self, key, offset, buffer):
            direct.append(np.shares_memory(np.frombuffer(buffer, np.uint8), out))
            super().read_into(key, offset, buffer)

    store = Watching(large.storage)
    request = (large.fragment(KEY), memoryview(out).cast("B"))
    CheckpointReader(store, large.manifest).read_into([request])
    assert direct[1:] == [True, True, True] and not direct[0]
    assert out.tobytes() == large.tensors[KEY][1].tobytes()
    path = large.file(large.ticket.shard_path(0))
    data = bytearray(path.read_bytes())
    data[4096 + (13 << 20) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumMismatchError, match=r"rank-00000\.shard#chunk 13"):
        CheckpointReader(large.storage, large.manifest).read_into([request])


@pytest.mark.parametrize("action", ["verify", "read"])
def test_memory_stays_bounded_whatever_the_size_of_the_shard(large, action, monkeypatch):
    monkeypatch.setattr(fetch, "_thread", threading.local())
    out = np.empty(5 << 20, np.float32)
    reader = CheckpointReader(large.storage, large.manifest, threads=1)
    tracemalloc.start()
    if action == "verify":
        reader.verify()
    else:
        # An odd start: no chunk but the middle ones of a run goes straight to the target.
        fragment = large.fragment(KEY, 3, (5 << 20) - 3)
        reader.read_into([(fragment, memoryview(out[6:]).cast("B"))])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < fetch.SPAN_BYTES + (2 << 20)


def test_after_an_error_no_call_is_running_and_none_is_begun():
    begun, running, others_run = [], set(), threading.Event()

    def call(number):
        begun.append(number)
        running.add(number)
        if number == 0:
            assert others_run.wait(10)
            running.discard(number)
            raise StorageError("first")
        others_run.set()
        running.discard(number)
        return number

    with pytest.raises(StorageError, match="first"):
        in_parallel(call, range(3), threads=2)
    assert not running
    assert in_parallel(lambda n: n * n, range(50), threads=4) == [n * n for n in range(50)]


def test_threads_may_share_a_reader(checkpoint_factory):
    written = checkpoint_factory(3, policy=CodecPolicy("zstd", 0.01))
    reader = CheckpointReader(written.storage, written.manifest)
    failures = []

    def work(key):
        try:
            assert np.array_equal(reader.read_tensor(key), written.tensors[key][1])
        except BaseException as error:
            failures.append(error)
            raise

    keys = [key for key in written.tensors if key.kind in ("fp32", "exp_avg", "exp_avg_sq")]
    threads = [threading.Thread(target=work, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def sealed_frame(frame, raw_digest):
    """A checkpoint of one 64 KiB chunk that is stored as `frame`, every digest above it right."""
    return sealed_frames(piece(0, 16384, shape=(16384,)), frame, raw_digest, 65536)


def sealed_frames(fragment, frame, raw_digest, chunk_bytes):
    """A checkpoint of one fragment, each whole chunk of which is stored as `frame`."""
    storage, ticket = MemoryStorage("m"), Ticket(1, 5, "a", "t", "periodic", 1, 7)
    layout = pack([fragment], chunk_bytes=chunk_bytes)
    with ShardWriter(storage, ticket, 0, layout) as writer:
        for chunk in layout.chunks:
            writer.put_all([EncodedChunk(chunk.index, frame, digest(frame.payload), raw_digest)])
        writer.finish()
    receipts = {0: storage.get(ticket.receipt_path(0), 1 << 16)}
    manifest, data = seal_manifest(ticket, receipts)
    storage.put(ticket.manifest_path, data)
    return CheckpointReader(storage, manifest)


def test_a_bomb_below_right_digests_is_refused_in_bounded_memory():
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 30))
    reader = sealed_frame(Frame(1, bomb), bytes(16))
    for action in (lambda: reader.read_tensor(KEY), reader.verify):
        tracemalloc.start()
        with pytest.raises(FormatError, match=r"rank-00000\.shard#chunk 0: says it decompresses"):
            action()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < fetch.SPAN_BYTES + (2 << 20)


def test_a_frame_that_decodes_to_other_bytes_than_were_written_is_refused():
    packed = zstandard.ZstdCompressor().compress(bytes(65536))
    reader = sealed_frame(Frame(1, packed), digest(b"x" * 65536))
    for action in (lambda: reader.read_tensor(KEY), reader.verify):
        with pytest.raises(ChecksumMismatchError, match=r"#chunk 0 \(decoded\)"):
            action()


def test_a_blob_that_is_larger_than_plain_data_may_be_is_refused_before_it_is_decoded():
    """Some 17 chunks of a hundred kilobytes in all, which would become more than 256 MiB."""
    size, raw = 17 * MAX_CHUNK_BYTES, bytes(MAX_CHUNK_BYTES)
    key = TensorKey("blob", "job")
    fragment = Fragment(key, "uint8", (size,), Interval(0, size))
    packed = zstandard.ZstdCompressor().compress(raw)
    reader = sealed_frames(fragment, Frame(1, packed), digest(raw), MAX_CHUNK_BYTES)
    tracemalloc.start()
    with pytest.raises(FormatError, match=r"blob.*job.* has 285212672 bytes, at most 268435456"):
        reader.blob(key)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_memory_is_taken_for_what_is_there_not_for_what_a_shape_says():
    reader = sealed([piece(0, 60, shape=(1 << 50,))], [])
    with pytest.raises(InvalidLayoutError, match="stored only in part"):
        reader.read_tensor(KEY)
