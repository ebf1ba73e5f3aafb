"""Damage of any small file of a store is told by its name, or changes nothing that is decided."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spotspeed import events
from spotspeed.checkpoint.catalog import scan
from spotspeed.checkpoint.commit import LATEST_KEY
from spotspeed.checkpoint.marker import check_latest, mark, read_latest, read_marker
from spotspeed.checkpoint.ownership import (
    claim_epoch,
    epoch_key,
    read_owner,
    record_restored_from,
    release,
    restored_key,
)
from spotspeed.checkpoint.sealed import open_manifest
from spotspeed.core.owner import Identity
from spotspeed.errors import CorruptionError
from spotspeed.storage.local import LocalStorage

WHO = Identity("node", "boot", "pid:[1]", 17, 4711)
SMALL = ["owner.json", epoch_key(1), epoch_key(2), restored_key(1), restored_key(2), LATEST_KEY]


@pytest.fixture
def store(tmp_path: Path, seal_small: Callable[..., Any]) -> LocalStorage:
    """Two epochs; what the first sealed above step 20 was never continued from."""
    storage = LocalStorage(tmp_path)
    claim_epoch(storage, identity=WHO)
    record_restored_from(storage, 1, None)
    kept = [seal_small(storage, 1, step) for step in (10, 20, 30)][1]
    release(storage, 1)
    claim_epoch(storage, identity=WHO)
    record_restored_from(storage, 2, kept.directory)
    seal_small(storage, 2, 25)
    return storage


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    said: list[str] = []

    def sink(event: events.Event) -> None:
        said.append(event.describe())

    events.add_sink(sink)
    yield said
    events.remove_sink(sink)


def decided(storage: LocalStorage) -> tuple[object, ...]:
    """What a launch, a restore and a collection go by."""
    catalog = scan(storage)
    owner = read_owner(storage)
    return (
        [info.directory for info in catalog.sealed],
        [info.directory for info in catalog.off_lineage],
        None if owner is None else (owner.epoch, owner.identity, owner.state, owner.nonce),
    )


def damages(data: bytes) -> Iterator[tuple[str, bytes | None]]:
    for offset in range(len(data)):
        flipped = bytearray(data)
        flipped[offset] ^= 1 << (offset % 8)
        yield f"bit {offset % 8} of byte {offset}", bytes(flipped)
    for length in {0, 1, len(data) // 2, len(data) - 1}:
        yield f"cut to {length} bytes", data[:length]
    yield "zeros", bytes(len(data))
    yield "garbage behind it", data + b"garbage"
    yield "twice", data + data
    yield "nested", b"[" * 100_000
    yield "huge number", b'{"epoch":' + b"9" * 5000 + b"}"


def test_the_fixture_has_an_abandoned_branch(store: LocalStorage) -> None:
    sealed, off, owner = decided(store)
    assert [name[:17] for name in sealed] == [
        "step-000000000025", "step-000000000020", "step-000000000010",
    ]  # fmt: skip
    assert [name[:17] for name in off] == ["step-000000000030"]
    assert owner == (2, WHO, "training", owner[3])


@pytest.mark.parametrize("key", SMALL)
def test_damage_is_told_or_changes_nothing(store: LocalStorage, tmp_path: Path, key: str) -> None:
    path = tmp_path / key
    data, right = path.read_bytes(), decided(store)
    name = f"epoch {int(key[7:13])}" if key.endswith(".restored.json") else key
    for what, damaged in damages(data):
        path.write_bytes(damaged or b"")
        with heard() as said:
            try:
                found = decided(store)
            except CorruptionError as error:
                assert key in str(error), (what, error)
                continue
        is_told = any(name in text or key in text for text in said)
        assert found == right or is_told, (what, found, said)
    path.write_bytes(data)
    assert decided(store) == right


def test_a_swapped_record_is_told(store: LocalStorage, tmp_path: Path) -> None:
    one, other = (tmp_path / restored_key(epoch) for epoch in (1, 2))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    with heard() as said:
        decided(store)
    assert any("epoch 1" in text for text in said) and any("epoch 2" in text for text in said)


def test_records_of_version_1_0_are_still_read(store: LocalStorage, tmp_path: Path) -> None:
    right = decided(store)
    for key in SMALL[:-1]:
        path = tmp_path / key
        record = json.loads(path.read_bytes())
        assert len(record.pop("sha256")) == 64
        path.write_bytes(json.dumps(record).encode())
    with heard() as said:
        assert decided(store) == right
    assert said == []


def test_damage_of_a_marker_names_it(store: LocalStorage, tmp_path: Path) -> None:
    folder = LocalStorage(tmp_path.parent / f"{tmp_path.name}-markers")
    [newest, *_] = scan(store).sealed
    manifest = open_manifest(store, newest.directory)
    mark(store, manifest, folder.url, "global_step25", is_latest=True)
    path = Path(folder.url) / "global_step25" / "spotspeed.json"
    data = path.read_bytes()
    right = read_marker(folder, "global_step25")
    assert right is not None and right.digest == newest.digest
    for what, damaged in damages(data):
        path.write_bytes(damaged or b"")
        try:
            found = read_marker(folder, "global_step25")
        except CorruptionError as error:
            assert "global_step25/spotspeed.json" in str(error)
        else:
            assert damaged == data[:-1] and found == right, f"{what}: only its line end is missing"
    path.write_bytes(data)
    assert read_marker(folder, "global_step25") == right
    assert read_latest(folder) == "global_step25"
    check_latest(folder, "global_step25")
    with pytest.raises(CorruptionError, match="latest: names the tag 'global_stex25'"):
        check_latest(folder, "global_stex25")
    for nothing in (b"", b" \n", bytes(13)):
        folder.put("latest", nothing)
        with pytest.raises(CorruptionError, match="latest: expected the name of a tag"):
            read_latest(folder)
