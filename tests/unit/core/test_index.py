"""Header, index and footer survive the round trip; contradictions are refused by name."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest

from spotspeed.core.chunks import Entry
from spotspeed.core.format import (
    FOOTER_BYTES,
    HEADER_BYTES,
    Footer,
    Header,
    encode_footer,
    encode_header,
    parse_footer,
    parse_header,
)
from spotspeed.core.index import ChunkRecord, ShardIndex, encode_index, parse_index
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.errors import ChecksumMismatchError, FormatError


def entry(name, count, raw_offset, **key):
    fragment = Fragment(TensorKey("fp32", name, **key), "float32", (count,), Interval(0, count))
    return Entry(fragment, raw_offset)


def make_index():
    return ShardIndex(
        bytes(range(32)), 1, 3, 4096 + 24,
        (entry("a", 1000, 0), entry("b", 30, 4000, scope="rank-1")),
        (ChunkRecord(0, 4096, 4096, 4096, 0, b"d" * 16, None),
         ChunkRecord(4096, 24, 8192, 20, 1, b"e" * 16, b"f" * 16)),
    )  # fmt: skip


def test_header_footer_and_index_survive_the_round_trip():
    header = Header(bytes(range(32)), 7, 9)
    data = encode_header(header)
    assert len(data) == HEADER_BYTES and parse_header(data, source="s") == header
    footer = Footer(8192, 1234, bytes(range(32)))
    data = encode_footer(footer)
    assert len(data) == FOOTER_BYTES and parse_footer(data, source="s") == footer
    assert footer.file_bytes == 8192 + 1234 + 64
    index = make_index()
    assert parse_index(encode_index(index), source="s") == index
    assert index.frames_stop == 12288


def refused(index, match):
    with pytest.raises(FormatError, match=match) as caught:
        parse_index(encode_index(index), source="the-file")
    assert "the-file" in str(caught.value)


def changed_chunk(number, **changes):
    index = make_index()
    chunks = list(index.chunks)
    chunks[number] = replace(chunks[number], **changes)
    return replace(index, chunks=tuple(chunks))


@pytest.mark.parametrize(
    "number,changes",
    [
        (0, {"raw_offset": 8}), (1, {"raw_offset": 4104}), (1, {"raw_size": 0}),
        (0, {"raw_size": 17 << 20}), (0, {"file_offset": 0}), (0, {"file_offset": 8192}),
        (1, {"file_offset": 8200}), (1, {"file_offset": 4096}), (1, {"file_offset": 12288}),
        (0, {"stored_size": 4095}), (0, {"stored_size": 4097}), (1, {"stored_size": 0}),
        (1, {"stored_size": 25}), (0, {"codec": 1}), (1, {"codec": 0}), (1, {"codec": 3}),
        (0, {"raw_digest": b"x" * 16}), (1, {"raw_digest": None}),
        (0, {"stored_digest": b"x" * 15}), (0, {"stored_digest": None}),
        (1, {"raw_digest": "f" * 16}), (0, {"raw_offset": True}), (0, {"codec": 0.0}),
    ],
)  # fmt: skip
def test_a_chunk_that_cannot_be_is_refused(number, changes):
    refused(changed_chunk(number, **changes), "index")


def test_chunks_must_hold_the_whole_stream():
    refused(replace(make_index(), raw_bytes=4096 + 32), "chunks hold 4120 of 4128")
    refused(replace(make_index(), chunks=make_index().chunks[:1]), "chunks hold 4096 of 4120")


@pytest.mark.parametrize(
    "entries",
    [
        (entry("a", 1000, 4),),
        (entry("a", 1000, 0), entry("b", 10, 3992)),
        (entry("b", 10, 4000), entry("a", 1000, 0)),
        (entry("a", 1031, 0),),
        (entry("a", 1, 8192),),
        (entry("n" * 5000, 1, 0),),
    ],
)
def test_an_entry_that_cannot_be_is_refused(entries):
    refused(replace(make_index(), entries=entries), "the-file")


def document(**changes):
    value = msgpack.unpackb(encode_index(make_index()))
    value.update(changes)
    return msgpack.packb({key: item for key, item in value.items() if item is not ...})


NESTED = [[[[[[[[1]]]]]]]]


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "x"}, {"document": "manifest"}, {"major": 2}, {"major": "1"}, {"minor": -1},
        {"ticket": b"short"}, {"ticket": None}, {"rank": 3}, {"rank": -1}, {"world_size": 0},
        {"raw_bytes": 2**63}, {"raw_bytes": "1"}, {"entries": 3}, {"chunks": {}}, {"chunks": None},
        {"entries": NESTED}, {"entries": [NESTED] * 8}, {"chunks": [[NESTED] * 7]},
        {"entries": [["fp32", "a", "", "float31", [1], 0, 1, 0]]},
        {"entries": [["fp32", "a", "", "float32", [1], 1, 0, 0]]},
        {"entries": [["fp32", "a", "", "float32", [1], 0, 2, 0]]},
        {"entries": [["fp32", "a", "", "float32", [-1], 0, 0, 0]]},
        {"entries": [["fp32", "a", "", "float32", [2**40, 2**40], 0, 1, 0]]},
        {"entries": [["fp32", "a", "", "float32", [1] * 33, 0, 1, 0]]},
        {"entries": [["fp32", "a", "", "float32", [1], 0, 1]]},
        {"entries": [["fp32", "a", "", "float32", [1], 0, 1, 0, 0]]},
        {"entries": [[b"fp32", "a", "", "float32", [1], 0, 1, 0]]},
        {"rank": ...}, {"entries": ...}, {"chunks": ...}, {"raw_bytes": ...}, {"future": 1},
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_is_refused(changes):
    with pytest.raises(FormatError, match="the-file"):
        parse_index(document(**changes), source="the-file")


def test_the_document_itself_parses():
    assert parse_index(document(), source="s") == make_index()


def test_a_newer_minor_version_may_add_fields():
    data = document(minor=1, future=NESTED, more={"a": [1, 2]})
    assert parse_index(data, source="s") == replace(make_index(), minor=1)


def test_bytes_behind_the_index_and_a_doubled_key_are_refused():
    with pytest.raises(FormatError, match="follow"):
        parse_index(document() + b"\0", source="s")
    doubled = document().replace(b"\xa6future", b"\xa4rank")
    items = list(msgpack.unpackb(document()).items())
    packer = msgpack.Packer()
    doubled = packer.pack_map_header(len(items) + 1) + b"".join(
        packer.pack(key) + packer.pack(value) for key, value in [items[0], *items]
    )
    with pytest.raises(FormatError, match="twice"):
        parse_index(doubled, source="s")


@pytest.mark.parametrize(
    "change", [(0, b"X"), (8, b"\2"), (12, b"\1"), (16, b"\xff"), (48, b"\x09"), (60, b"\0\0\0\0")]
)
def test_a_changed_header_is_refused(change):
    offset, value = change
    data = bytearray(encode_header(Header(bytes(32), 7, 9)))
    data[offset : offset + len(value)] = value
    with pytest.raises((FormatError, ChecksumMismatchError), match="the-file"):
        parse_header(bytes(data), source="the-file")


def test_a_header_of_another_version_or_with_flags_says_so():
    import hashlib

    def header(**fields):
        data = bytearray(encode_header(Header(bytes(32), 0, 1)))
        for offset, value in fields.values():
            data[offset : offset + len(value)] = value
        data[56:88] = hashlib.sha256(data[:56]).digest()
        return bytes(data)

    for fields, match in (
        ({"major": (8, b"\2\0")}, "format 2.0"), ({"flags": (12, b"\4")}, "flags 0x4"),
        ({"rank": (48, b"\1")}, "rank 1 of 1"), ({"tail": (4095, b"\1")}, "not zero"),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=match):
            parse_header(header(**fields), source="s")
    assert parse_header(header(minor=(10, b"\3\0")), source="s").minor == 3


@pytest.mark.parametrize(
    "offset,value",
    [(0, b"\1"), (7, b"\xff"), (15, b"\xff"), (48, b"\2"), (52, b"\1"), (63, b"\0")],
)
def test_a_changed_footer_is_refused(offset, value):
    data = bytearray(encode_footer(Footer(8192, 100, bytes(32))))
    data[offset : offset + len(value)] = value
    with pytest.raises(FormatError, match="the-file"):
        parse_footer(bytes(data), source="the-file")
