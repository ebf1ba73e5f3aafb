"""Whatever happens to the files of a sealed checkpoint is found and laid at the right file."""

from __future__ import annotations

import numpy as np
import pytest

from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.sealed import open_manifest, open_receipt, open_shard
from spotspeed.codec import CodecPolicy
from spotspeed.core.manifest import MANIFEST_FILE
from spotspeed.errors import CorruptionError, SpotSpeedError

POLICIES = [CodecPolicy("raw"), CodecPolicy("zstd", 0.01)]


@pytest.fixture(params=POLICIES, ids=lambda policy: policy.mode)
def written(checkpoint_factory, request):
    return checkpoint_factory(2, policy=request.param)


def shard_of(written, rank=0):
    return open_shard(written.storage, open_receipt(written.storage, written.manifest, rank))


def flip(path, offset, mask=0x40):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def read_all(written):
    """Read everything through the public reader; raises whatever it raises."""
    directory = written.ticket.directory
    reader = CheckpointReader.open(written.storage, directory, digest=written.manifest.digest)
    requests = [(written.fragment(key), bytearray(array.nbytes))
                for key, (_, array) in written.tensors.items()]  # fmt: skip
    reader.read_into(requests)
    for fragment, buffer in requests:
        assert bytes(buffer) == written.bytes_of(fragment), "damaged bytes were handed out"


def damages(written):
    return CheckpointReader(written.storage, written.manifest).find_damage().damages


def assert_found(written, name, *, by_reading):
    """`verify` names file `name` and nothing else; reading does too, where it must touch it."""
    found = damages(written)
    assert found, f"damage of {name} was not found"
    assert all(name in str(error) for error in found), found
    with pytest.raises(CorruptionError, match=name):
        CheckpointReader(written.storage, written.manifest).verify()
    if by_reading:
        with pytest.raises(CorruptionError, match=name):
            read_all(written)
    else:
        read_all(written)


def test_an_undamaged_checkpoint_has_no_damage(written):
    assert damages(written) == ()
    read_all(written)


def test_a_flip_in_every_chunk_is_found(written):
    for rank in range(2):
        shard = shard_of(written, rank)
        path, name = written.file(shard.path), f"rank-{rank:05d}.shard"
        for number, record in enumerate(shard.index.chunks):
            offset = record.file_offset + (number * 977) % record.stored_size
            flip(path, offset)
            assert f"#chunk {number}" in str(damages(written)[0])
            with pytest.raises(CorruptionError, match=rf"{name}#chunk {number}:"):
                read_all(written)
            flip(path, offset)
    assert damages(written) == ()


def test_a_flip_anywhere_in_the_header_is_found(written):
    path = written.file(written.ticket.shard_path(0))
    for offset in [*range(0, 90), 100, 2000, 4095]:
        flip(path, offset, mask := 1 << offset % 8)
        [damage] = damages(written)
        assert "rank-00000.shard" in str(damage)
        flip(path, offset, mask)
    flip(path, 3)
    assert_found(written, "rank-00000.shard", by_reading=False)


def test_a_flip_in_the_padding_between_frames_is_found(written):
    shard = shard_of(written)
    ends = [record.file_stop for record in shard.index.chunks]
    starts = [record.file_offset for record in shard.index.chunks[1:]]
    starts.append(shard.receipt.shard.index_offset)
    gaps = [(end, start) for end, start in zip(ends, starts, strict=True) if start > end]
    assert len(gaps) > 3
    path = written.file(shard.path)
    for end, start in gaps:
        for offset in {end, (end + start) // 2, start - 1}:
            flip(path, offset)
            [damage] = damages(written)
            assert "padding" in str(damage) and "rank-00000.shard" in str(damage)
            if start != shard.receipt.shard.index_offset:
                with pytest.raises(CorruptionError, match=r"rank-00000\.shard.*padding"):
                    read_all(written)
            flip(path, offset)


def test_a_flip_anywhere_in_index_or_footer_is_found(written):
    shard = shard_of(written).receipt.shard
    path = written.file(shard.path)
    stop = shard.size_bytes
    index = range(shard.index_offset, stop - 64, max(1, shard.index_bytes // 60))
    for offset in [*index, *range(stop - 64, stop)]:
        flip(path, offset)
        assert_found(written, "rank-00000.shard", by_reading=True)
        flip(path, offset)


@pytest.mark.parametrize("file", ["rank-00001.receipt", MANIFEST_FILE])
def test_a_flip_of_any_byte_of_receipt_or_manifest_is_found(written, file):
    path = written.file(f"{written.ticket.directory}/{file}")
    for offset in range(path.stat().st_size):
        flip(path, offset, mask := 1 << offset % 8)
        with pytest.raises(CorruptionError, match=file):
            manifest = open_manifest(written.storage, written.ticket.directory)
            open_receipt(written.storage, manifest, 1)
        flip(path, offset, mask)
    flip(path, path.stat().st_size // 2)
    assert_found(written, file, by_reading=True)


def test_every_truncation_is_found(written):
    directory = written.ticket.directory
    for file in ("rank-00000.shard", "rank-00000.receipt", MANIFEST_FILE):
        path = written.file(f"{directory}/{file}")
        data = path.read_bytes()
        size = len(data)
        lengths = {0, 1, 63, 64, 4095, 4096, 4097, size // 3, size // 2, size - 65, size - 64,
                   size - 63, size - 1}  # fmt: skip
        for length in sorted(length for length in lengths if 0 <= length < size):
            path.write_bytes(data[:length])
            assert_found(written, file, by_reading=True)
        path.write_bytes(data)
    assert damages(written) == ()


@pytest.mark.parametrize("tail", [b"\0", b"x", bytes(4096), b"garbage" * 1000])
def test_anything_appended_is_found(written, tail):
    for file in ("rank-00000.shard", "rank-00000.receipt", MANIFEST_FILE):
        path = written.file(f"{written.ticket.directory}/{file}")
        data = path.read_bytes()
        path.write_bytes(data + tail)
        assert_found(written, file, by_reading=True)
        path.write_bytes(data)


@pytest.mark.parametrize("file", ["rank-00001.shard", "rank-00001.receipt"])
def test_a_deleted_file_is_corruption_and_not_a_missing_object(written, file):
    written.file(f"{written.ticket.directory}/{file}").unlink()
    assert_found(written, file, by_reading=True)


def test_a_deleted_manifest_is_damage_to_who_knew_it(written):
    written.file(written.ticket.manifest_path).unlink()
    [damage] = damages(written)
    assert MANIFEST_FILE in str(damage)


@pytest.mark.parametrize("suffix", ["shard", "receipt"])
def test_swapped_files_are_found(written, suffix):
    paths = [written.file(f"{written.ticket.directory}/rank-0000{n}.{suffix}") for n in range(2)]
    contents = [path.read_bytes() for path in paths]
    for path, data in zip(paths, reversed(contents), strict=True):
        path.write_bytes(data)
    with pytest.raises(CorruptionError, match=rf"rank-0000.\.{suffix}"):
        read_all(written)
    assert {f"rank-0000{n}.{suffix}" in str(error) for n, error in
            enumerate(damages(written))} == {True}  # fmt: skip


def test_a_shard_of_another_step_is_found_even_with_the_same_data(checkpoint_factory):
    from dataclasses import replace

    first = checkpoint_factory(2)
    second = checkpoint_factory(2, ticket=replace(first.ticket, step=11))
    source = second.file(second.ticket.shard_path(0)).read_bytes()
    assert len(source) == first.file(first.ticket.shard_path(0)).stat().st_size
    first.file(first.ticket.shard_path(0)).write_bytes(source)
    assert_found(first, "rank-00000.shard", by_reading=True)


def test_zeroed_pages_and_zeroed_files_are_found(written):
    shard = shard_of(written)
    path = written.file(shard.path)
    data = path.read_bytes()
    for offset in range(0, len(data), 4096):
        page = data[offset : offset + 4096]
        if not any(page):
            continue
        path.write_bytes(data[:offset] + bytes(len(page)) + data[offset + len(page) :])
        assert damages(written), offset
    path.write_bytes(bytes(len(data)))
    assert_found(written, "rank-00000.shard", by_reading=True)


def test_every_damaged_file_is_reported_at_once(written):
    flip(written.file(written.ticket.shard_path(0)), 0)
    written.file(written.ticket.receipt_path(1)).unlink()
    flip(written.file(written.ticket.manifest_path), 30)
    named = " ".join(str(error) for error in damages(written))
    for file in ("rank-00000.shard", "rank-00001.receipt", MANIFEST_FILE):
        assert file in named


def test_random_damage_never_gives_wrong_numbers(written):
    """Either the right bytes or a CorruptionError, whatever is overwritten."""
    rng = np.random.default_rng(7)
    files = [info.key for info in written.storage.list()]
    for _ in range(120):
        path = written.file(files[rng.integers(len(files))])
        data = path.read_bytes()
        damaged = bytearray(data)
        start = int(rng.integers(len(data)))
        damaged[start : start + int(rng.integers(1, 5000))] = rng.bytes(int(rng.integers(0, 5000)))
        path.write_bytes(damaged)
        try:
            read_all(written)
        except SpotSpeedError as error:
            assert isinstance(error, CorruptionError), error
        if damaged != data:
            assert damages(written)
        path.write_bytes(data)


def test_reading_one_tensor_does_not_suffer_from_damage_elsewhere(written):
    shard = shard_of(written)
    last = shard.index.chunks[-1]
    flip(written.file(shard.path), last.file_offset)
    key = shard.index.entries[0].fragment.key
    reader = CheckpointReader(written.storage, written.manifest)
    assert np.array_equal(reader.read_tensor(key), written.tensors[key][1])
