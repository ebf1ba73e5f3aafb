"""Frozen objects: named by content, grouped, listed in receipts, swept when nobody needs them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from spotspeed.core.documents import canonical_json, seal
from spotspeed.core.frozen import (
    GROUP_BYTES,
    MIN_BYTES,
    ObjectRecord,
    content_of,
    groups,
    object_path,
    plan_sweep,
    writer_of,
)
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.lineage import Place
from spotspeed.core.manifest import (
    Receipt,
    ShardRecord,
    Ticket,
    decode_manifest,
    decode_receipt,
    encode_receipt,
    seal_manifest,
)
from spotspeed.errors import FormatError

TICKET = Ticket(2, 10, "a", "t", "periodic", 1, 1_700_000_000)
CONTENT, HEX = "cd" * 32, "ab" * 32
RECORD = ObjectRecord(CONTENT, "0f" * 16, object_path(TICKET.directory, CONTENT), 9000, 8192, 700,
                      HEX, 4096)  # fmt: skip
SHARD = ShardRecord(TICKET.shard_path(0), 9000, 8192, 700, HEX, 4096)
RECEIPT = Receipt(TICKET, 0, SHARD, "00" * 16, (RECORD,))


def test_a_receipt_with_objects_survives_the_round_trip_and_has_another_major_version():
    data = encode_receipt(RECEIPT)
    assert decode_receipt(data, source="r") == RECEIPT
    assert json.loads(data)["body"]["major"] == 2
    manifest, stored = seal_manifest(TICKET, {0: data})
    assert decode_manifest(stored, source="m") == manifest
    assert (manifest.major, manifest.data_bytes, manifest.object_bytes) == (2, 9000, 9000)


def test_without_objects_the_documents_are_those_of_the_older_versions():
    for coverage, minor in (("00" * 16, 1), (None, 0)):
        data = encode_receipt(Receipt(TICKET, 0, SHARD, coverage))
        body = json.loads(data)["body"]
        assert (body["major"], body["minor"]) == (1, minor) and "objects" not in body
        assert ("coverage" in body) == (minor == 1)
        sealed = json.loads(seal_manifest(TICKET, {0: data})[1])["body"]
        assert (sealed["major"], sealed["minor"]) == (1, minor)


@pytest.mark.parametrize(
    "change",
    [
        {"path": "frozen/../../etc/passwd"}, {"path": f"/etc/{CONTENT}.shard"},
        {"path": f"other/{TICKET.directory}/{CONTENT}.shard"}, {"content": "ee" * 32},
        {"path": f"frozen/{TICKET.directory}/{CONTENT}.shard/x"}, {"coverage": "0F" * 16},
        {"path": f"frozen/..{TICKET.directory}/{CONTENT}.shard"}, {"size_bytes": 0},
        {"size_bytes": -1}, {"size_bytes": 2**63}, {"index_offset": 2**62}, {"index_sha256": "x"},
        {"content": "../x"}, {"size_bytes": True}, {"path": 3},
    ],
)  # fmt: skip
def test_a_hostile_object_record_is_refused(change):
    body = json.loads(encode_receipt(RECEIPT))["body"]
    body["objects"][0] |= change
    with pytest.raises(FormatError, match="the-file"):
        decode_receipt(seal(body), source="the-file")


def test_a_receipt_that_lists_no_object_or_one_twice_is_refused():
    body = json.loads(encode_receipt(RECEIPT))["body"]
    for listed in ([], body["objects"] * 2, {}, None, [[]], [None]):
        with pytest.raises(FormatError, match="the-file"):
            decode_receipt(seal(body | {"objects": listed}), source="the-file")
    assert canonical_json(body)  # the body itself was fine
    with pytest.raises(FormatError, match="unknown key 'objects'"):
        decode_receipt(seal(body | {"major": 1, "minor": 1}), source="the-file")


def test_content_tells_bytes_names_and_cuts_apart():
    one = Fragment(TensorKey("weight", "w"), "float32", (8,), Interval(0, 8))
    base = content_of([(one, b"d" * 16)])
    assert base == content_of([(one, b"d" * 16)])
    others = [
        [(one, b"e" * 16)], [(one.narrow(Interval(0, 4)), b"d" * 16)],
        [(replace(one, key=TensorKey("weight", "v")), b"d" * 16)], [(one, b"d" * 16)] * 2, [],
    ]  # fmt: skip
    assert len({base, *(content_of(other) for other in others)}) == 6


def test_groups_hold_neighbours_and_everything_once():
    assert groups([]) == groups([MIN_BYTES - 1]) == []
    assert groups([MIN_BYTES]) == [range(0, 1)]
    sizes = [GROUP_BYTES // 2] * 5
    assert groups(sizes) == [range(0, 2), range(2, 4), range(4, 5)]
    assert groups([3 * GROUP_BYTES, 1, 3 * GROUP_BYTES]) == [range(n, n + 1) for n in range(3)]
    huge = groups([GROUP_BYTES // 3] * 40_000)
    assert len(huge) <= 130
    assert [n for group in huge for n in group] == list(range(40_000))


def test_only_what_is_older_than_a_seal_of_this_epoch_and_in_no_receipt_is_swept():
    def path(epoch, step):
        return object_path(replace(TICKET, epoch=epoch, step=step).directory, CONTENT)

    objects = {name: path(*name) for name in [(1, 5), (1, 90), (2, 10), (2, 20), (2, 30)]}
    foreign = ["frozen/notes/readme.shard", "frozen/x"]
    present = [*objects.values(), *foreign]

    def swept(referred, newest):
        found = plan_sweep(present, referred, newest=newest)
        return {name for name, key in objects.items() if key in found}

    assert all(writer_of(key) is None for key in foreign)
    assert swept([], None) == set()
    assert swept([], Place(2, 20)) == {(1, 5), (1, 90), (2, 10)}, "20 itself may still be stored"
    assert swept([objects[1, 5]], Place(2, 30)) == {(1, 90), (2, 10), (2, 20)}
