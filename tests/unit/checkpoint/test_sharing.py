"""What ranks of a node have in common is read once for all of them, verified, or by each alone."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from spotspeed.checkpoint import fetch, sharing
from spotspeed.checkpoint.fill import fill
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.sharing import fill_shared
from spotspeed.core.layout import Holding
from spotspeed.core.owner import Identity
from spotspeed.errors import ChecksumMismatchError, InvalidLayoutError
from spotspeed.state.piece import Piece, dtype_of

RANKS = 3
SHARED = ("fp32", "exp_avg", "exp_avg_sq", "step", "weight")


class Ranks:
    """The control plane of ranks that are threads of this process."""

    def __init__(self, count=RANKS):
        self.count, self.values, self.labels = count, {}, [[] for _ in range(count)]
        self.barrier = threading.Barrier(count, timeout=60)

    def exchange(self, rank):
        def all_gather(label, value):
            self.values[rank] = value
            self.labels[rank].append(label)
            self.barrier.wait()
            found = [self.values[other] for other in range(self.count)]
            self.barrier.wait()
            return found

        return all_gather

    def run(self, action):
        """`action` of every rank at once, given its number and its exchange."""
        with ThreadPoolExecutor(self.count) as pool:
            running = [pool.submit(action, rank, self.exchange(rank)) for rank in range(self.count)]
            return [one.result() for one in running]


def targets(written, rank):
    """Everything but blobs: shared by all ranks where its kind is, this rank's alone else."""
    pieces = []
    for key, (dtype, array) in written.tensors.items():
        if key.kind in SHARED:
            fragment = written.fragment(key)
            tensor = torch.zeros(array.size, dtype=dtype_of(dtype))
            pieces.append(Piece(Holding(fragment, rank, RANKS), tensor))
        elif key.kind == "buffer":
            fragment = written.fragment(key, rank, rank + 7)
            pieces.append(Piece(Holding(fragment), torch.zeros(7, dtype=dtype_of(dtype))))
    return pieces


def is_right(written, pieces):
    return all(piece.view().tobytes() == written.bytes_of(piece.fragment) for piece in pieces)


def kinds(pieces):
    """Of what is not empty."""
    return [piece.fragment.key.kind for piece in pieces if piece.tensor.numel()]


@pytest.fixture
def written(checkpoint_factory, model_tensors, monkeypatch):
    # Many reads and windows from little data.
    monkeypatch.setattr(fetch, "SPAN_BYTES", 16 * 1024)
    return checkpoint_factory(2, tensors=model_tensors(scale=8), chunk_bytes=4096)


def restore(written, counting, ranks, *, readers=None, windows=(64 * 1024,), least=1):
    stores = [counting(written.storage) for _ in range(ranks.count)]
    pieces = [targets(written, rank) for rank in range(ranks.count)]

    def rank_restores(rank, exchange):
        reader = CheckpointReader(stores[rank], written.manifest)
        reader.tensors()
        del stores[rank].reads[:]
        given = reader if readers is None else readers(rank, reader)
        found = fill_shared(pieces[rank], given, exchange, rank, least_bytes=least,
                            window_bytes=windows[rank % len(windows)])  # fmt: skip
        if found.is_whole:
            fill(found.rest, reader)
        return found

    return ranks.run(rank_restores), stores, pieces


def test_common_tensors_are_read_once_for_all_ranks(written, counting):
    ranks = Ranks()
    found, stores, pieces = restore(written, counting, ranks)
    assert all(is_right(written, own) for own in pieces)
    assert all(each.is_whole and kinds(each.rest) == ["buffer"]
               for each in found)  # fmt: skip
    common = sum(
        piece.fragment.size_bytes for piece in pieces[0] if piece.holding.replica_count > 1
    )
    read = sum(store.bytes_read for store in stores)
    # Beside it, the buffers of each rank and the chunks that end with something else.
    assert common <= read <= common + RANKS * 2 * 4096 and read < 1.1 * common
    assert min(each.bytes_read for each in found) > common / RANKS / 2
    assert ranks.labels[0].count("restore-window") > 4 and len(set(map(tuple, ranks.labels))) == 1


def test_ranks_that_cannot_share_memory_read_for_themselves(written, counting, monkeypatch):
    monkeypatch.setattr(sharing.os, "getpid", lambda: 1)  # Not where the file is.
    _, stores, pieces = restore(written, counting, Ranks())
    assert all(is_right(written, own) for own in pieces)
    assert min(store.bytes_read for store in stores) > 100_000


def test_ranks_of_other_nodes_and_with_other_needs_keep_to_themselves(
    written, counting, monkeypatch
):
    nodes = iter(("one", "one", "two"))
    monkeypatch.setattr(
        sharing, "this_process", lambda: Identity("h", next(nodes), "n", sharing.os.getpid(), 1)
    )
    found, stores, pieces = restore(written, counting, Ranks())
    assert all(is_right(written, own) for own in pieces)
    alone = max(range(RANKS), key=lambda rank: stores[rank].bytes_read)
    assert len(found[alone].rest) == len(pieces[alone])
    assert all(kinds(found[rank].rest) == ["buffer"] for rank in range(RANKS) if rank != alone)


def test_little_is_not_worth_taking_turns(written, counting):
    ranks = Ranks()
    found, _, pieces = restore(written, counting, ranks, least=10**9)
    assert all(is_right(written, own) for own in pieces) and all(each.is_whole for each in found)
    assert ranks.labels[0] == ["restore-shared"]


def test_damage_that_one_rank_finds_ends_the_reading_of_all(written, counting):
    file = written.file(written.manifest.ticket.shard_path(1))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    ranks = Ranks()
    found, _, _ = restore(written, counting, ranks)
    assert not any(each.is_whole for each in found)
    (error,) = [each.error for each in found if each.error is not None]
    assert isinstance(error, ChecksumMismatchError) and "shard" in str(error)
    assert len(set(map(tuple, ranks.labels))) == 1


def test_a_rank_that_cannot_open_the_checkpoint_keeps_the_others_from_reading(written, counting):
    def only_some(rank, reader):
        return None if rank == 1 else reader

    found, stores, _ = restore(written, counting, Ranks(), readers=only_some)
    assert not any(each.is_whole or each.error for each in found)
    assert not any(store.reads for store in stores)


def test_what_the_checkpoint_does_not_hold_is_the_error_of_whoever_asked(written, counting):
    class Other:
        def plan(self, fragments):
            raise InvalidLayoutError(json.dumps([str(one.key) for one in fragments[:1]]))

    def asks(rank, reader):
        return Other() if rank == 2 else reader

    found, _, _ = restore(written, counting, Ranks(), readers=asks)
    assert [type(each.error) for each in found] == [type(None), type(None), InvalidLayoutError]
