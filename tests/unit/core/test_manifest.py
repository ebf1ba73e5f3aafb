"""Tickets, receipts and manifests: pure, sealed, bounded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from spotspeed.core.manifest import (
    MAX_DOCUMENT_BYTES,
    MAX_RECEIPT_BYTES,
    Manifest,
    Receipt,
    ReceiptRecord,
    ShardRecord,
    Ticket,
    canonical_json,
    decode_manifest,
    decode_receipt,
    encode_manifest,
    encode_receipt,
    seal_manifest,
)
from spotspeed.errors import ChecksumMismatchError, CorruptionError, FormatError

TICKET = Ticket(2, 10, "a1", "global_step10", "periodic", 3, 1_700_000_000, None)
HEX = "ab" * 32


def receipt(rank, ticket=TICKET):
    return Receipt(ticket, rank, ShardRecord(ticket.shard_path(rank), 9000, 8192, 700, HEX, 4096))


def sealed(ticket=TICKET):
    receipts = {rank: encode_receipt(receipt(rank, ticket)) for rank in range(ticket.world_size)}
    return seal_manifest(ticket, receipts)


def reseal(data, change):
    """The document with `change` made to its body and a seal that is right again."""
    body = json.loads(data)["body"]
    changed = change(body)
    content = canonical_json(body if changed is None else changed)
    return envelope(content)


def envelope(content):
    digest = hashlib.sha256(content).hexdigest().encode()
    return b'{"body":' + content + b',"sha256":"' + digest + b'"}\n'


def test_receipts_and_manifests_survive_the_round_trip():
    assert decode_receipt(encode_receipt(receipt(1)), source="r") == receipt(1)
    manifest, data = sealed()
    assert decode_manifest(data, source="m") == manifest
    assert encode_manifest(decode_manifest(data, source="m")) == data
    assert data.count(b"\n") == 1 and json.loads(data)["sha256"] == manifest.digest
    assert decode_manifest(data, source="m").digest == manifest.digest


def test_the_manifest_is_a_pure_function_of_ticket_and_receipts():
    receipts = {rank: encode_receipt(receipt(rank)) for rank in (2, 0, 1)}
    assert seal_manifest(TICKET, receipts) == sealed()
    late = replace(TICKET, created_unix_s=TICKET.created_unix_s + 60)
    assert seal_manifest(late, receipts) == sealed()
    assert late.digest == TICKET.digest and replace(TICKET, step=11).digest != TICKET.digest


def test_any_change_of_a_receipt_changes_the_digest_of_the_whole():
    other = replace(receipt(1), shard=replace(receipt(1).shard, index_sha256="cd" * 32))
    receipts = {rank: encode_receipt(receipt(rank)) for rank in range(3)}
    receipts[1] = encode_receipt(other)
    assert seal_manifest(TICKET, receipts)[0].digest != sealed()[0].digest


def test_sealing_refuses_missing_and_foreign_receipts():
    receipts = {rank: encode_receipt(receipt(rank)) for rank in range(3)}
    with pytest.raises(FormatError, match=r"no receipt of ranks \[1\]"):
        seal_manifest(TICKET, {0: receipts[0], 2: receipts[2]})
    with pytest.raises(FormatError, match=r"rank-00001\.receipt"):
        seal_manifest(TICKET, {**receipts, 1: receipts[2]})
    foreign = encode_receipt(receipt(1, replace(TICKET, step=11)))
    with pytest.raises(FormatError, match=r"rank-00001\.receipt"):
        seal_manifest(TICKET, {**receipts, 1: foreign})


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 0}, {"epoch": True}, {"step": -1}, {"step": 2**53 + 1}, {"world_size": 0},
        {"world_size": 65_537}, {"attempt": ""}, {"attempt": "a" * 65}, {"attempt": "a/b"},
        {"tag": "../x"}, {"tag": "a..b"}, {"tag": "x" * 201}, {"tag": "\u00fc"}, {"tag": ".x"},
        {"reason": "why"}, {"restored_from": "/etc"}, {"created_unix_s": -1}, {"step": 1.0},
    ],
)  # fmt: skip
def test_a_ticket_that_cannot_be_is_refused(changes):
    with pytest.raises(FormatError):
        replace(TICKET, **changes)


def test_directories_sort_by_step_and_their_files_fit_a_store_component():
    tickets = [replace(TICKET, step=step) for step in (2, 10, 999, 10**9)]
    assert sorted(ticket.directory for ticket in tickets) == [t.directory for t in tickets]
    longest = replace(TICKET, step=2**53, epoch=2**53, attempt="a" * 64)
    assert len(longest.directory) <= 200


def set_in(*path):
    *parents, last = path[:-1]

    def change(body):
        for key in parents:
            body = body[key]
        body[last] = path[-1]

    return change


MANIFEST_CHANGES = [
    set_in("format", "x"), set_in("document", "receipt"), set_in("major", 2),
    set_in("major", True), set_in("minor", -1), set_in("minor", None), set_in("data_bytes", -1),
    set_in("data_bytes", 2**63), set_in("data_bytes", "1"), set_in("receipts", {}),
    set_in("receipts", 0, None), set_in("receipts", 0, "rank", 1),
    set_in("receipts", 0, "rank", "0"),
    set_in("receipts", 1, "path", "../../etc/passwd"), set_in("receipts", 1, "size_bytes", 0),
    set_in("receipts", 1, "size_bytes", 2**40), set_in("receipts", 1, "sha256", "ab"),
    set_in("receipts", 1, "sha256", "AB" * 32), set_in("receipts", 1, "more", 1),
    set_in("ticket", []), set_in("ticket", "world_size", 2), set_in("ticket", "world_size", 10**9),
    set_in("ticket", "tag", "../x"), set_in("ticket", "epoch", "1"), set_in("ticket", "more", 1),
    set_in("more", 1), lambda body: body.pop("receipts") and None, lambda body: [body],
    lambda body: body["receipts"].append(body["receipts"][0]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MANIFEST_CHANGES)))
def test_a_sealed_manifest_that_cannot_be_is_refused(number):
    data = reseal(sealed()[1], MANIFEST_CHANGES[number])
    with pytest.raises(FormatError, match="the-file"):
        decode_manifest(data, source="the-file")


RECEIPT_CHANGES = [
    set_in("rank", 3), set_in("rank", -1), set_in("rank", None), set_in("shard", None),
    set_in("shard", "path", "x"), set_in("shard", "size_bytes", -1),
    set_in("shard", "size_bytes", 2**63), set_in("shard", "index_offset", 8999),
    set_in("shard", "index_bytes", -1), set_in("shard", "index_sha256", "zz" * 32),
    set_in("shard", "raw_bytes", True), set_in("shard", "extra", 0),
    set_in("ticket", "step", 2**60), set_in("document", "manifest"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(RECEIPT_CHANGES)))
def test_a_sealed_receipt_that_cannot_be_is_refused(number):
    data = reseal(encode_receipt(receipt(1)), RECEIPT_CHANGES[number])
    with pytest.raises(FormatError, match="the-file"):
        decode_receipt(data, source="the-file")


def test_a_newer_minor_version_may_add_keys_and_keeps_its_digest():
    data = reseal(sealed()[1], lambda body: body.update(minor=2, future=["x"]))
    manifest = decode_manifest(data, source="m")
    assert (manifest.minor, manifest.digest) == (2, json.loads(data)["sha256"])
    assert manifest.receipts == sealed()[0].receipts


@pytest.mark.parametrize(
    "content",
    [
        b"", b"1", b"[]", b'"x"', b"null", b"{}", b'{"a":1e999}', b'{"a":NaN}', b'{"a":1.5}',
        b'{"a": 1}', b'{"b":1,"a":2}', b'{"a":1,"a":1}', b'{"a":"\xc3\xbc"}', b'{"a":"\xff"}',
        b'{"a":' + b"9" * 5000 + b"}", b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b"[" * 100_000, b'{"a":' * 3000 + b"1" + b"}" * 3000,
    ],
)  # fmt: skip
def test_a_sealed_body_that_is_no_canonical_json_is_refused(content):
    for decode in (decode_manifest, decode_receipt):
        with pytest.raises(FormatError, match="the-file"):
            decode(envelope(content), source="the-file")


def test_hostile_documents_cost_bounded_memory():
    import tracemalloc

    bodies = [b'{"a":[' + b"[]," * 3_000_000 + b"[]]}", b'{"a":[' + b"1," * 4_000_000 + b"1]}",
              b'{"a":"' + b"x" * 9_000_000 + b'"}']  # fmt: skip
    for content in bodies:
        data = envelope(content)
        tracemalloc.start()
        with pytest.raises(FormatError):
            decode_manifest(data, source="m")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 5 * len(data)


def test_oversized_documents_are_not_parsed():
    with pytest.raises(FormatError, match="at most"):
        decode_manifest(bytes(MAX_DOCUMENT_BYTES + 1), source="m")
    with pytest.raises(FormatError, match="at most"):
        decode_receipt(bytes(MAX_RECEIPT_BYTES + 1), source="m")


def test_every_flip_and_every_truncation_is_corruption():
    _, manifest = sealed()
    for decode, data in ((decode_manifest, manifest),
                         (decode_receipt, encode_receipt(receipt(1)))):  # fmt: skip
        for offset in range(len(data)):
            for mask in (1, 32, 128):
                damaged = bytearray(data)
                damaged[offset] ^= mask
                with pytest.raises(CorruptionError, match="the-file"):
                    decode(bytes(damaged), source="the-file")
            with pytest.raises(CorruptionError, match="the-file"):
                decode(data[:offset], source="the-file")


def test_a_wrong_seal_tells_both_digests():
    data = sealed()[1].replace(b'"step":10', b'"step":11')
    with pytest.raises(ChecksumMismatchError, match="m: the stored digest is"):
        decode_manifest(data, source="m")


def test_the_largest_world_fits_the_limits():
    ticket = replace(TICKET, world_size=65_536, tag="t" * 200, restored_from="r" * 200,
                     attempt="a" * 64)  # fmt: skip
    records = tuple(
        ReceiptRecord(rank, ticket.receipt_path(rank), 2000, HEX) for rank in range(65_536)
    )
    data = encode_manifest(Manifest(ticket, records, 2**60))
    assert len(data) <= MAX_DOCUMENT_BYTES
    assert decode_manifest(data, source="m").receipts == records
    assert len(encode_receipt(receipt(65_535, ticket))) < MAX_RECEIPT_BYTES
