"""Hostile bytes in any structure of the format give CorruptionError, in bounded memory."""

from __future__ import annotations

import contextlib
import hashlib
import tracemalloc
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotspeed.core.chunks import Entry
from spotspeed.core.format import (
    Footer,
    Header,
    encode_footer,
    encode_header,
    parse_footer,
    parse_header,
)
from spotspeed.core.frozen import ObjectRecord, object_path
from spotspeed.core.index import ChunkRecord, ShardIndex, encode_index, parse_index
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import (
    Receipt,
    ShardRecord,
    Ticket,
    canonical_json,
    decode_manifest,
    decode_receipt,
    encode_receipt,
    seal_manifest,
)
from spotspeed.errors import CorruptionError, FormatError

TICKET = Ticket(1, 5, "a", "t", "notice", 2, 7)
RECEIPTS = {
    rank: encode_receipt(
        Receipt(TICKET, rank, ShardRecord(TICKET.shard_path(rank), 9000, 8192, 700, "0a" * 32, 8))
    )
    for rank in range(2)
}
CONTENT = "cd" * 32
OBJECT = ObjectRecord(CONTENT, "0f" * 16, object_path(TICKET.directory, CONTENT), 9000, 8192, 700,
                      "0a" * 32, 8)  # fmt: skip
WITH_OBJECT = {
    rank: encode_receipt(
        replace(
            decode_receipt(data, source="r"), coverage="00" * 16, objects=(OBJECT,) * (1 - rank)
        )
    )
    for rank, data in RECEIPTS.items()
}
INDEX = ShardIndex(
    bytes(32), 0, 2, 4120,
    tuple(
        Entry(Fragment(TensorKey("fp32", f"p{n}"), "float32", (2, 50), Interval(0, 100)), n * 400)
        for n in range(10)
    ),
    (ChunkRecord(0, 4096, 4096, 4096, 0, bytes(16), None),
     ChunkRecord(4096, 24, 8192, 9, 1, bytes(16), bytes(16))),
)  # fmt: skip

STRUCTURES = {
    "header": (parse_header, encode_header(Header(bytes(32), 0, 2))),
    "footer": (parse_footer, encode_footer(Footer(8192, 77, bytes(32)))),
    "index": (parse_index, encode_index(INDEX)),
    "receipt": (decode_receipt, RECEIPTS[0]),
    "manifest": (decode_manifest, seal_manifest(TICKET, RECEIPTS)[1]),
    "receipt-2": (decode_receipt, WITH_OBJECT[0]),
    "manifest-2": (decode_manifest, seal_manifest(TICKET, WITH_OBJECT)[1]),
}


def only_corruption(parse, data):
    with contextlib.suppress(CorruptionError):
        parse(data, source="s")


@pytest.mark.parametrize("name", STRUCTURES)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_edited_structures_parse_or_are_corruption(name, data):
    parse, good = STRUCTURES[name]
    edited = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(edited)))
        stop = data.draw(st.integers(start, min(len(edited), start + 40)))
        edited[start:stop] = data.draw(st.binary(max_size=40))
    only_corruption(parse, bytes(edited))


@pytest.mark.parametrize("name", STRUCTURES)
@settings(max_examples=200, deadline=None)
@given(noise=st.binary(max_size=300))
def test_noise_is_corruption(name, noise):
    parse, good = STRUCTURES[name]
    with pytest.raises(CorruptionError):
        parse(noise, source="s")
    only_corruption(parse, (noise + good[len(noise) :])[: len(good)])


numbers = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([0, -1, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64 - 1, 4096]),
)
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=12), st.binary(max_size=40),
              st.floats()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=9),
        st.dictionaries(st.text(max_size=9), inner, max_size=5),
    ),
    max_leaves=20,
)  # fmt: skip
index_keys = st.sampled_from(sorted(msgpack.unpackb(encode_index(INDEX))))


def paths(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items if isinstance(value, (dict, list)) else ():
        if isinstance(item, (dict, list)):
            yield from paths(item, (*path, key))
        else:
            yield (*path, key)


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_an_index_with_foreign_values_parses_or_is_corruption(data):
    document = msgpack.unpackb(encode_index(INDEX))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(paths(document))))
        document = replaced(document, path, data.draw(plain))
        if not isinstance(document, (dict, list)):
            break
    only_corruption(parse_index, msgpack.packb(document))


def json_only(value):
    """`value` without what JSON does not have."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return 0
    if isinstance(value, list):
        return [json_only(item) for item in value]
    if isinstance(value, dict):
        return {key: json_only(item) for key, item in value.items()}
    return value


@pytest.mark.parametrize("name", ["receipt", "manifest", "receipt-2", "manifest-2"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_resealed_document_with_foreign_values_parses_or_is_corruption(name, data):
    import json

    parse, good = STRUCTURES[name]
    body = json.loads(good)["body"]
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(paths(body))))
        body = replaced(body, path, json_only(data.draw(plain)))
        if not isinstance(body, (dict, list)):
            break
    content = canonical_json(body)
    seal = hashlib.sha256(content).hexdigest().encode()
    only_corruption(parse, b'{"body":' + content + b',"sha256":"' + seal + b'"}\n')


BIG = 4_000_000


def tree(depth):
    """Lists of 32 lists, `depth` levels of them: short ones, and a million in all."""
    return b"\xdc\x00\x20" + tree(depth - 1) * 32 if depth else b"\x90"


HOSTILE = {
    "a bushy tree": tree(4),
    "nested lists": b"\x91" * BIG,
    "many empty lists": b"\xdd\x00\x40\x00\x00" + b"\x90" * BIG,
    "a list that claims 4 billion items": b"\xdd\xff\xff\xff\xff" + b"\x90" * 100,
    "a map that claims 4 billion items": b"\xdf\xff\xff\xff\xff" + b"\xa0" * 100,
    "text that claims 4 GiB": b"\xdb\xff\xff\xff\xff" + b"x" * 100,
    "bytes that claim 4 GiB": b"\xc6\xff\xff\xff\xff" + b"x" * 100,
    "an extension of 4 GiB": b"\xc9\xff\xff\xff\xff\x01" + b"x" * 100,
    "long text": b"\xdb\x00\x30\x00\x00" + b"x" * 0x300000,
}
PREFIX = {
    "as the document": b"",
    "as a value": msgpack.packb({"format": "spotspeed"})[:-10],
    "as the entries": b"\x82\xa9raw_bytes\x08\xa7entries",
    "as an entry": b"\x82\xa9raw_bytes\x08\xa7entries\x91",
    "as a field of an entry": b"\x82\xa9raw_bytes\x08\xa7entries\x91\x98",
    "as a shape": b"\x82\xa9raw_bytes\x08\xa7entries\x91\x98\xa1k\xa1n\xa0\xa7float32",
    "as the chunks": b"\x82\xa9raw_bytes\x08\xa6chunks",
    "as a field of a chunk": b"\x82\xa9raw_bytes\x08\xa6chunks\x91\x97",
    "as an unknown key of a newer version": b"\x82\xa5minor\x05\xa4more",
}


@pytest.mark.parametrize("where", PREFIX)
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_msgpack_costs_bounded_memory(where, what):
    data = PREFIX[where] + HOSTILE[what]
    tracemalloc.start()
    with pytest.raises(FormatError):
        parse_index(data, source="s")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * len(data) + (1 << 20), (where, what)
