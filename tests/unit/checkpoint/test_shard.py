"""A shard appears whole, its receipt only after it, and misuse is refused."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from spotspeed.checkpoint.sealed import open_shard
from spotspeed.checkpoint.shard import ShardWriter, largest_file_bytes
from spotspeed.codec import RAW, CodecPolicy
from spotspeed.core.chunks import pack
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket, decode_receipt
from spotspeed.errors import CaptureError, StorageError
from spotspeed.storage.local import LocalStorage
from spotspeed.storage.memory import MemoryStorage

TICKET = Ticket(1, 5, "a", "t", "periodic", 2, 7)


def fragment(name, count, kind="fp32"):
    return Fragment(TensorKey(kind, name), "float32", (count,), Interval(0, count))


LAYOUT = pack([fragment("p", 2500), fragment("q", 3), fragment("p", 10, "exp_avg")],
              chunk_bytes=4096)  # fmt: skip


def chunks(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.bytes(chunk.size_bytes) for chunk in LAYOUT.chunks]


@pytest.fixture(params=[LocalStorage, MemoryStorage], ids=["local", "memory"])
def storage(request, tmp_path):
    return LocalStorage(tmp_path) if request.param is LocalStorage else MemoryStorage("m")


class Recorder:
    """Notes the order in which objects become durable."""

    def __init__(self, inner):
        self._inner, self.durable = inner, []

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def put(self, key, data):
        self._inner.put(key, data)
        self.durable.append(key)

    def writer(self, key):
        writer, note = self._inner.writer(key), self.durable.append

        class Noting:
            def __getattr__(self, name):
                return getattr(writer, name)

            def commit(self):
                writer.commit()
                note(key)

        return Noting()


def test_the_receipt_comes_after_the_shard_and_describes_it(storage):
    recorder = Recorder(storage)
    with ShardWriter(recorder, TICKET, 1, LAYOUT) as writer:
        for number, data in enumerate(chunks()):
            writer.put_chunk(number, data)
            assert writer.chunks_put == number + 1
        assert storage.list() == []
        receipt = writer.finish()
    assert recorder.durable == [TICKET.shard_path(1), TICKET.receipt_path(1)]
    stored = storage.get(TICKET.receipt_path(1), 1 << 16)
    assert decode_receipt(stored, source="r") == receipt
    data = storage.get(TICKET.shard_path(1), 1 << 20)
    shard = receipt.shard
    assert len(data) == shard.size_bytes == writer.stored_bytes
    index = data[shard.index_offset : shard.index_offset + shard.index_bytes]
    assert hashlib.sha256(index).hexdigest() == shard.index_sha256
    assert shard.raw_bytes == LAYOUT.raw_bytes
    opened = open_shard(storage, receipt)
    assert opened.index.entries == LAYOUT.entries
    assert len(data) <= largest_file_bytes(LAYOUT)


def test_the_buffer_is_free_for_the_next_chunk(storage):
    arena = bytearray(4096)
    with ShardWriter(storage, TICKET, 0, LAYOUT) as writer:
        for number, data in enumerate(chunks()):
            arena[: len(data)] = data
            writer.put_chunk(number, memoryview(arena)[: len(data)])
            arena[:] = b"\xff" * len(arena)
        receipt = writer.finish()
    data = storage.get(TICKET.shard_path(0), 1 << 20)
    for record, content in zip(open_shard(storage, receipt).index.chunks, chunks(), strict=True):
        assert data[record.file_offset : record.file_stop] == content


def test_chunks_may_be_encoded_ahead_and_put_in_order(storage):
    policy = CodecPolicy("zstd", 0.01)
    contents = [bytes(chunk.size_bytes) for chunk in LAYOUT.chunks]
    with ShardWriter(storage, TICKET, 0, LAYOUT, policy) as writer:
        encoded = [writer.encode(number, contents[number])
                   for number in reversed(range(len(contents)))]  # fmt: skip
        for item in reversed(encoded):
            writer.put_all([item])
        receipt = writer.finish()
    assert {chunk.codec for chunk in open_shard(storage, receipt).index.chunks} == {1}


def test_a_writer_that_is_left_leaves_nothing(storage):
    with ShardWriter(storage, TICKET, 0, LAYOUT) as writer:
        writer.put_chunk(0, chunks()[0])
    assert storage.list() == []
    with pytest.raises(RuntimeError), ShardWriter(storage, TICKET, 0, LAYOUT):
        raise RuntimeError("the rank is gone")
    assert storage.list() == []


def test_chunks_out_of_order_and_of_another_size_are_refused(storage):
    with ShardWriter(storage, TICKET, 0, LAYOUT) as writer:
        with pytest.raises(ValueError, match="chunk 1 was put, 0 is next"):
            writer.put_chunk(1, chunks()[1])
        with pytest.raises(ValueError, match="chunk 0 has 4096 bytes, given 5"):
            writer.put_chunk(0, b"12345")


def test_finishing_early_is_refused_and_nothing_appears(storage):
    with ShardWriter(storage, TICKET, 0, LAYOUT) as writer:
        writer.put_chunk(0, chunks()[0])
        with pytest.raises(CaptureError, match="3 of 4 chunks were not put"):
            writer.finish()
    assert storage.list() == []


def test_what_the_format_cannot_hold_is_refused_before_it_is_committed(storage):
    layout = pack([fragment("n" * 5000, 1)], chunk_bytes=4096)
    with ShardWriter(storage, TICKET, 0, layout) as writer:
        writer.put_chunk(0, bytes(8))
        with pytest.raises(CaptureError, match="exceeds the format"):
            writer.finish()
    assert storage.list() == []


def test_a_rank_outside_the_world_is_refused(storage):
    with pytest.raises(ValueError, match="rank 2 of 2"):
        ShardWriter(storage, TICKET, 2, LAYOUT)


def test_a_receipt_is_not_written_when_the_shard_could_not_be_committed(storage):
    class Full(Recorder):
        def writer(self, key):
            writer = self._inner.writer(key)

            class Failing:
                def __getattr__(self, name):
                    return getattr(writer, name)

                def commit(self):
                    writer.abort()
                    raise StorageError(f"write {key} failed: no space is left")

            return Failing()

    with pytest.raises(StorageError), ShardWriter(Full(storage), TICKET, 0, LAYOUT) as writer:
        for number, data in enumerate(chunks()):
            writer.put_chunk(number, data)
        writer.finish()
    assert storage.list() == []


def test_the_same_input_gives_the_same_file(storage):
    files = []
    for _ in range(2):
        with ShardWriter(storage, TICKET, 0, LAYOUT, RAW) as writer:
            for number, data in enumerate(chunks()):
                writer.put_chunk(number, data)
            writer.finish()
        files.append(storage.get(TICKET.shard_path(0), 1 << 20))
    assert files[0] == files[1]


def test_a_rank_without_state_writes_an_empty_shard(storage):
    with ShardWriter(storage, TICKET, 0, pack([], chunk_bytes=4096)) as writer:
        receipt = writer.finish()
    assert open_shard(storage, receipt).index.entries == ()
    assert receipt.shard.index_offset == 4096 and receipt.shard.raw_bytes == 0
