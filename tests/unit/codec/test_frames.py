"""Frames decode to what was encoded, never grow, and cannot be made to inflate memory."""

from __future__ import annotations

import contextlib
import resource
import struct
import threading
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from spotspeed.codec import RAW, CodecPolicy, decode, digest, encode
from spotspeed.codec import planes as planes_module
from spotspeed.codec.digest import check_digest
from spotspeed.errors import ChecksumMismatchError, CorruptionError, FormatError

ZSTD = CodecPolicy("zstd", 0.01)
SAMPLED = CodecPolicy("sampled", 0.08)


def weights(count=200_000, seed=0):
    return (np.random.default_rng(seed).standard_normal(count) * 0.02).astype(np.float32)


def round_trip(data, item_bytes, policy):
    frame = encode(data, item_bytes, policy)
    out = bytearray(len(data))
    decode(frame.codec, bytes(frame.payload), out, key="f")
    assert bytes(out) == bytes(data)
    assert len(frame.payload) <= len(data)
    return frame


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=3000).flatmap(lambda part: st.sampled_from([part, part * 40])),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.sampled_from([RAW, ZSTD, SAMPLED]),
)
def test_every_chunk_decodes_to_itself_and_never_grows(data, item_bytes, policy):
    round_trip(data, item_bytes, policy)


@pytest.mark.parametrize("policy", [ZSTD, SAMPLED])
def test_trained_numbers_are_stored_as_byte_planes(policy):
    values = weights()
    frame = round_trip(memoryview(values).cast("B"), 4, policy)
    assert frame.codec == 2 and len(frame.payload) < 0.87 * values.nbytes
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    frame = round_trip(memoryview(halves).cast("B"), 2, policy)
    assert frame.codec == 2 and len(frame.payload) < 0.75 * halves.nbytes


@pytest.mark.parametrize("policy", [ZSTD, SAMPLED])
def test_noise_stays_raw_without_a_copy(policy):
    noise = np.random.default_rng(1).integers(0, 256, 1 << 20).astype(np.uint8)
    view = memoryview(noise)
    frame = encode(view, 4, policy)
    assert frame.codec == 0 and frame.payload is view


def test_text_and_zeros_are_plain_zstd():
    assert round_trip(bytes(100_000), 4, ZSTD).codec == 1
    assert round_trip(b"layers.0.weight " * 5000, 1, ZSTD).codec == 1


def test_the_policy_follows_the_config_and_the_sink():
    assert CodecPolicy.choose("none", is_worth=True).mode == "raw"
    assert CodecPolicy.choose("zstd", is_worth=False).mode == "zstd"
    assert CodecPolicy.choose(None, is_worth=False).mode == "raw"
    assert CodecPolicy.choose(None, is_worth=True).mode == "sampled"


def test_threads_encode_at_once():
    data = [memoryview(weights(50_000, seed)).cast("B") for seed in range(4)]
    failures = []

    def work(view):
        try:
            for _ in range(5):
                round_trip(view, 4, ZSTD)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(view,)) for view in data]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("item_bytes", [2, 4, 8])
def test_native_and_python_planes_agree(item_bytes, monkeypatch):
    data = np.random.default_rng(2).bytes(item_bytes * 1003)
    results = []
    for native in (planes_module._native, None):
        monkeypatch.setattr(planes_module, "_native", native)
        planes, back = bytearray(len(data)), bytearray(len(data))
        planes_module.split_planes(data, item_bytes, planes)
        planes_module.join_planes(planes, item_bytes, back)
        assert bytes(back) == data
        results.append(bytes(planes))
    assert results[0] == results[1]
    assert results[0] == b"".join(data[number::item_bytes] for number in range(item_bytes))


def zstd_frame(size, byte=b"\0"):
    return zstandard.ZstdCompressor(level=19).compress(byte * size)


def zstd_without_size(size):
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    return compressor.compress(bytes(size))


def planes_header(*sizes):
    return struct.pack(f"<B3x{len(sizes)}I", len(sizes), *sizes)


BOMB = zstd_frame(1 << 30)


@pytest.mark.parametrize(
    "codec,payload",
    [
        (1, BOMB),
        (1, zstd_without_size(1 << 26)),
        (1, zstd_frame(4095)),
        (1, zstd_frame(4097)),
        (1, zstd_frame(4096)[:-3]),
        (1, zstd_frame(4096) + b"x"),
        (1, zstd_frame(4096) + zstd_frame(4096)),
        (1, b""),
        (1, b"\x28\xb5\x2f\xfd" + b"\xff" * 40),
        (1, b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"),
        (2, b""),
        (2, b"\x04"),
        (2, b"\x03" + bytes(4095)),
        (2, b"\x04\x01\x00\x00" + bytes(4096)),
        (2, planes_header(1024, 1024, 1024, 1023) + bytes(4095)),
        (2, planes_header(1024, 1024, 1024, 1024) + bytes(4095)),
        (2, planes_header(1024, 1024, 1024, 1024) + bytes(4097)),
        (2, planes_header(1024, 1024, 1024, 0x7FFFFFFF) + bytes(4096)),
        (2, planes_header(len(BOMB) | 1 << 31, 1024, 1024, 1024) + BOMB + bytes(3072)),
        (0, bytes(4095)),
        (0, bytes(4097)),
        (3, bytes(4096)),
        (-1, bytes(4096)),
    ],
)
def test_a_payload_that_is_not_the_chunk_is_refused_in_bounded_memory(codec, payload):
    out = bytearray(4096)
    tracemalloc.start()
    with pytest.raises(FormatError, match="the-file"):
        decode(codec, payload, out, key="the-file")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_frame_that_claims_a_huge_window_costs_no_memory():
    # RFC 8878, 3.1.1: 4-byte content size, a window of 2 GiB, one RLE block of 4096 bytes.
    header = b"\x28\xb5\x2f\xfd" + bytes([0x80, 21 << 3]) + struct.pack("<I", 4096)
    payload = header + struct.pack("<I", 4096 << 3 | 1 << 1 | 1)[:3] + b"x"
    out = bytearray(4096)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(FormatError):
        decode(1, payload, out, key="f")
        assert out == b"x" * 4096
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([0, 1, 2]), st.data())
def test_a_changed_payload_decodes_or_is_corruption(codec, data):
    chunk = memoryview(weights(2000)).cast("B") if codec == 2 else bytes(8000)
    frame = encode(chunk, 4, ZSTD if codec else RAW)
    assert frame.codec == codec
    payload = bytearray(frame.payload)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(payload) - 1))
        payload[place] ^= data.draw(st.integers(1, 255))
    payload = payload[: data.draw(st.integers(0, len(payload)))]
    with contextlib.suppress(CorruptionError):
        decode(codec, payload, bytearray(8000), key="f")


def test_the_digest_is_canonical_xxh3_128():
    # Test vector of the XXH3-128 specification: the digest of no bytes at all.
    assert digest(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert digest(bytearray(b"abc")) == digest(memoryview(b"abc"))
    check_digest(b"abc", digest(b"abc"), key="k")
    with pytest.raises(ChecksumMismatchError, match="k: "):
        check_digest(b"abd", digest(b"abc"), key="k")
