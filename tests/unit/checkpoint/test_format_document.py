"""docs/FORMAT.md is enough: a reader made from its tables alone reads what we write."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import struct
from pathlib import Path

import msgpack
import numpy as np
import pytest
import xxhash
import zstandard

from spotspeed.checkpoint.opened import open_checkpoint
from spotspeed.codec import CodecPolicy
from spotspeed.storage.local import LocalStorage

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "fixtures" / "golden-v1"
GOLDEN_1_1 = ROOT / "tests" / "fixtures" / "golden-v1.1"
GOLDEN_2 = ROOT / "tests" / "fixtures" / "golden-v2"
GOLDEN_DIGEST = "67af8f68198b809f2d24f2aa12f0b1d4d7af9dc7f0d99c3d1653a4aa0f97cfc6"
GOLDEN_1_1_DIGEST = "3ccbdac190c4a7be7d036b47f781ce8929f4c2cc5b26b2d4da73fdc892407e06"
GOLDEN_2_DIGEST = "387e65e34a02ed53de8e3e68355d972eeb732e9d466521ed90f8d86e40925613"
NUMPY = {"float32": "<f4", "bfloat16": "<u2", "int64": "<i8", "uint8": "u1", "bool": "?"}

# The independent reader: nothing of spotspeed from here to its end.


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def read_document(path, document):
    data = path.read_bytes()
    body = data[8:-78]
    assert data == b'{"body":' + body + b',"sha256":"' + sha256(body).encode() + b'"}\n'
    parsed = json.loads(body)
    assert (parsed["format"], parsed["document"]) == ("spotspeed", document)
    assert parsed["major"] == 2 if {"objects", "object_bytes"} & parsed.keys() else 1
    return parsed


def ticket_digest(ticket):
    identity = {key: value for key, value in ticket.items() if key != "created_unix_s"}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def inflate(data, size):
    raw = zstandard.ZstdDecompressor().decompress(data)
    assert len(raw) == size
    return raw


def decode(codec, frame, raw_size):
    if codec == 0:
        return frame
    if codec == 1:
        return inflate(frame, raw_size)
    assert codec == 2 and frame[1:4] == bytes(3)
    width = frame[0]
    sizes = struct.unpack_from(f"<{width}I", frame, 4)
    raw, position = bytearray(raw_size), 4 + 4 * width
    for plane, word in enumerate(sizes):
        stored = frame[position : position + (word & 0x7FFFFFFF)]
        position += len(stored)
        raw[plane::width] = inflate(stored, raw_size // width) if word >> 31 else stored
    assert position == len(frame)
    return bytes(raw)


def read_shard(data, shard, digest, rank, world_size):
    """[(kind, name, scope, dtype, shape, start, stop, bytes)] of one shard; all of it checked."""
    assert len(data) == shard["size_bytes"]
    magic, major, minor, flags = struct.unpack_from("<8sHHI", data, 0)
    assert (magic, major, minor, flags) == (b"\x93SPOTSHD", 1, 0, 0)
    assert data[16:48] == digest
    assert struct.unpack_from("<II", data, 48) == (rank, world_size)
    assert data[56:88] == hashlib.sha256(data[:56]).digest() and not any(data[88:4096])

    offset, size, index_digest, major, minor, reserved, magic = struct.unpack(
        "<QQ32sHHI8s", data[-64:]
    )
    assert (major, minor, reserved, magic) == (1, 0, 0, b"SPOTEND\x93")
    assert offset + size + 64 == len(data) and offset % 4096 == 0
    assert (offset, size) == (shard["index_offset"], shard["index_bytes"])
    assert sha256(data[offset : offset + size]) == index_digest.hex() == shard["index_sha256"]
    index = msgpack.unpackb(data[offset : offset + size])
    assert list(index) == ["format", "document", "major", "minor", "ticket", "rank", "world_size",
                           "raw_bytes", "entries", "chunks"]  # fmt: skip
    assert (index["ticket"], index["rank"]) == (digest, rank)

    stream, reach = b"", 4096
    for raw_offset, raw_size, file_offset, stored_size, codec, stored, raw in index["chunks"]:
        assert raw_offset == len(stream) and file_offset == -(-reach // 4096) * 4096
        assert not any(data[reach:file_offset])
        reach = file_offset + stored_size
        frame = data[file_offset:reach]
        assert xxhash.xxh3_128(frame).digest() == stored
        content = decode(codec, frame, raw_size)
        assert len(content) == raw_size
        assert (raw is None) if codec == 0 else xxhash.xxh3_128(content).digest() == raw
        stream += content
    assert len(stream) == index["raw_bytes"] == shard["raw_bytes"]
    assert offset == -(-reach // 4096) * 4096 and not any(data[reach:offset])
    parts, reach = [], 0
    for kind, name, scope, dtype, shape, start, stop, raw_offset in index["entries"]:
        assert raw_offset % 8 == 0 and not any(stream[reach:raw_offset])
        reach = raw_offset + (stop - start) * np.dtype(NUMPY[dtype]).itemsize
        parts.append((kind, name, scope, dtype, shape, start, stop, stream[raw_offset:reach]))
    return parts


def place_number(kind, name, scope, dtype, shape, element):
    packed = msgpack.packb([kind, name, scope, dtype, shape, element])
    return int.from_bytes(hashlib.sha256(packed).digest()[:16], "big")


def coverage(parts):
    total = 0
    for *tensor, start, stop, _ in parts:
        count = int(np.prod(tensor[-1], dtype=np.int64))
        total += place_number(*tensor, stop) - place_number(*tensor, start)
        if start == 0 and (stop or not count):
            total -= place_number(*tensor, count) - place_number(*tensor, 0)
    return f"{total % 2**128:032x}"


def read_object(path, record):
    """What a frozen object holds, all of it checked."""
    assert record["path"].endswith(f"/{record['content']}.shard")
    digest = bytes.fromhex(record["content"])
    parts = read_shard((path / record["path"]).read_bytes(), record, digest, 0, 1)
    rows = [[*part[:-1], xxhash.xxh3_128(part[-1]).digest()] for part in parts]
    assert sha256(msgpack.packb(rows)) == record["content"]
    assert coverage(parts) == record["coverage"]
    return parts


def read_checkpoint(path):
    """{(kind, name, scope): (dtype, array)} of the one checkpoint at `path`."""
    [manifest_path] = path.glob("*/manifest.json")
    manifest = read_document(manifest_path, "manifest")
    tensors, filled, numbers = {}, {}, []
    for rank, record in enumerate(manifest["receipts"]):
        data = (path / record["path"]).read_bytes()
        assert (sha256(data), len(data)) == (record["sha256"], record["size_bytes"])
        receipt = read_document(path / record["path"], "receipt")
        assert receipt["rank"] == record["rank"] == rank
        ticket, shard = receipt["ticket"], receipt["shard"]
        parts = read_shard((path / shard["path"]).read_bytes(), shard, ticket_digest(ticket), rank,
                           ticket["world_size"])  # fmt: skip
        for item in receipt.get("objects", []):
            parts += read_object(path, item)
        if (receipt["major"], receipt["minor"]) > (1, 0):
            assert coverage(parts) == receipt["coverage"]
            numbers.append(int(receipt["coverage"], 16))
        for kind, name, scope, dtype, shape, start, stop, content in parts:
            key = (kind, name, scope)
            whole = tensors.setdefault(key, (dtype, np.zeros(shape, NUMPY[dtype])))
            count = filled.setdefault(key, np.zeros(whole[1].size, int))
            whole[1].reshape(-1)[start:stop] = np.frombuffer(content, NUMPY[dtype])
            count[start:stop] += 1
    assert sum(numbers) % 2**128 == 0
    assert all(np.all(count == 1) for count in filled.values())
    return tensors


def read_plain(data):
    """Plain data: what a reader of blobs needs of its extensions."""

    def unpack(payload):
        return msgpack.unpackb(payload, ext_hook=extension, strict_map_key=False)

    def extension(code, payload):
        if code == 13:
            dtype, shape, content = unpack(payload)
            return ("tensor", dtype, tuple(shape), content)
        if code == 12:
            dtype, shape, content = unpack(payload)
            return np.frombuffer(content, dtype).reshape(shape)
        items = unpack(payload)
        if code in (6, 7, 8):
            return dict(zip(items[::2], items[1::2], strict=True))
        return {3: tuple, 4: set, 5: frozenset}[code](items)

    return unpack(data)


def read_record(path):
    """A record of a launch, whose SHA-256 is that of the rest of it."""
    record = json.loads(path.read_text())
    digest = record.pop("sha256")
    assert sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()) == digest
    return record


def read_lineage(path):
    """{epoch: highest step on the lineage, None without a limit}."""
    records = {int(file.name[:6]): file for file in (path / "epochs").glob("*.json")}
    epoch, limit, lineage = max(records), None, {}
    while epoch >= 1:
        lineage[epoch] = limit
        file = path / "epochs" / f"{epoch:06d}.restored.json"
        if not file.exists():
            epoch -= 1
            continue
        origin = read_record(file)["restored_from"]
        if origin is None:
            break
        step, epoch = (int(number) for number in re.match(r"step-(\d+)\.e(\d+)", origin).groups())
        limit = step if limit is None else min(limit, step)
    return lineage


# The end of the independent reader.


def golden_maker():
    spec = importlib.util.spec_from_file_location(
        "make_golden", ROOT / "tests" / "fixtures" / "make_golden.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same(found, expected):
    assert set(found) == {(key.kind, key.name, key.scope) for key in expected}
    for key, (dtype, array) in expected.items():
        found_dtype, found_array = found[key.kind, key.name, key.scope]
        assert found_dtype == dtype and found_array.shape == array.shape
        assert found_array.tobytes() == array.tobytes()


@pytest.mark.parametrize("mode", ["raw", "zstd", "sampled"])
@pytest.mark.parametrize("world_size", [1, 4])
def test_a_reader_made_from_the_document_reads_every_checkpoint(
    checkpoint_factory, mode, world_size
):
    written = checkpoint_factory(world_size, policy=CodecPolicy(mode, 0.01))
    assert_same(read_checkpoint(written.root), written.tensors)


def held_by(golden):
    maker = golden_maker()
    return maker.tensors_1_1() if golden == GOLDEN_1_1 else maker.tensors()


@pytest.mark.parametrize("golden", [GOLDEN, GOLDEN_1_1, GOLDEN_2], ids=["1.0", "1.1", "2.0"])
def test_a_reader_made_from_the_document_reads_the_golden_checkpoint(golden):
    assert_same(read_checkpoint(golden), held_by(golden))


def test_a_reader_made_from_the_document_reads_blobs_and_records_of_launches():
    maker, tensors = golden_maker(), read_checkpoint(GOLDEN_1_1)
    job = read_plain(tensors["blob", "job", ""][1].tobytes())
    client = job.pop("client_state")
    assert client == {"name": "naïve", "ema": ("tensor", "float16", (2,), bytes(4)), 3: {1}}
    assert job == {key: value for key, value in maker.JOB.items() if key != "client_state"}
    rank = read_plain(tensors["blob", "rank", "rank-1"][1].tobytes())
    assert rank["rank"] == 1 and rank["rng"]["python"] == (3, (1, 2, 3), None)
    assert rank["rng"]["torch"].tolist() == [0, 1, 2, 3, 4]
    assert tensors["weight", "layers.0.bias", "elements-3-5"][1].tolist() == [0x3C01, 0x3C02]
    assert read_lineage(GOLDEN_1_1) == {3: None, 2: 1000}
    owner = read_record(GOLDEN_1_1 / "owner.json")
    assert (owner["epoch"], owner["state"], owner["identity"]["host"]) == (
        3, "released", "trainer-0",
    )  # fmt: skip
    latest = json.loads((GOLDEN_1_1 / "latest.json").read_text())
    assert latest["digest"] == GOLDEN_1_1_DIGEST


def test_what_a_run_writes_today_is_still_written_byte_for_byte(tmp_path):
    """But for the compressed shard, whose bytes are the compressor's."""
    golden_maker().write_1_1(tmp_path)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        if not path.name.startswith(("rank-00001", "manifest", "latest")):
            assert path.read_bytes() == (GOLDEN_1_1 / path.relative_to(tmp_path)).read_bytes()


@pytest.mark.parametrize(
    "golden,digest",
    [(GOLDEN, GOLDEN_DIGEST), (GOLDEN_1_1, GOLDEN_1_1_DIGEST), (GOLDEN_2, GOLDEN_2_DIGEST)],
    ids=["1.0", "1.1", "2.0"],
)
def test_the_golden_checkpoint_stays_readable(golden, digest):
    opened = open_checkpoint(str(golden))
    assert opened.manifest.digest == digest
    assert opened.reader.verify().is_whole
    codecs = set()
    for key, (dtype, array) in held_by(golden).items():
        stored = opened.reader.tensors()[key]
        assert (stored.dtype, stored.shape) == (dtype, array.shape)
        found = opened.reader.read_tensor(key)
        if dtype == "bfloat16":
            found = (found.view(np.uint32) >> 16).astype(np.uint16)
        assert found.tobytes() == array.tobytes()
    for path in golden.glob("*/*.shard"):
        data = path.read_bytes()
        offset, size = struct.unpack_from("<QQ", data, len(data) - 64)
        codecs |= {chunk[4] for chunk in msgpack.unpackb(data[offset : offset + size])["chunks"]}
    assert codecs == {0, 1, 2}
    assert sum(path.stat().st_size for path in golden.rglob("*") if path.is_file()) < 50_000


def test_a_raw_shard_is_still_written_byte_for_byte(tmp_path):
    maker = golden_maker()
    maker.write_shard(LocalStorage(tmp_path), 0, CodecPolicy("raw"))
    key = maker.TICKET.shard_path(0)
    assert (tmp_path / key).read_bytes() == (GOLDEN / key).read_bytes()


def test_a_checkpoint_with_a_frozen_object_is_still_written_byte_for_byte(tmp_path):
    maker = golden_maker()
    storage = LocalStorage(tmp_path)
    maker.write_shard(storage, 0, CodecPolicy("raw"), objects=[maker.write_object(storage, 0)])
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 3
    for path in written:
        assert path.read_bytes() == (GOLDEN_2 / path.relative_to(tmp_path)).read_bytes()


def test_the_document_states_the_limits_of_the_code():
    from spotspeed.core import chunks, format, index, layout, manifest

    text = (ROOT / "docs" / "FORMAT.md").read_text()
    mebi = 1 << 20
    for phrase in (
        f"At most {index.MAX_INDEX_BYTES // mebi} MiB of [MessagePack]",
        f"A **manifest** (at most {manifest.MAX_DOCUMENT_BYTES // mebi} MiB)",
        f"A **receipt** (at most {manifest.MAX_RECEIPT_BYTES // 1024} KiB)",
        f"One chunk holds at most {chunks.MAX_CHUNK_BYTES // mebi} MiB",
        f"up to {index.MAX_DIMENSIONS} dimensions, ",
        f" 2^{index.MAX_ELEMENTS.bit_length() - 1} elements",
        f"at most {index.MAX_NAME_BYTES} bytes",
        f"1 to {manifest.MAX_WORLD_SIZE} ",
        f"version {manifest.FORMAT_MAJOR}.{manifest.FORMAT_MINOR}",
        f"header, {format.HEADER_BYTES} bytes", f"footer, {format.FOOTER_BYTES} bytes",
    ):  # fmt: skip
        assert phrase in text, phrase
    assert set(layout.ITEM_BYTES) <= set(re.findall(r"\w+", text))
