"""Markers are found under every tag that DeepSpeed could have, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spotspeed.checkpoint.agreement import all_or_none, share
from spotspeed.checkpoint.marker import Marker, check_place, read_marker, write_marker
from spotspeed.errors import ConfigError, SpotSpeedError
from spotspeed.storage import open_storage
from spotspeed.storage.local import LocalStorage

MARKER = Marker("/catalogue", "step-000000000005.e000001.d1", "0" * 64, 5, "step-5")


@pytest.mark.parametrize("tag", ["global_step5", "a/b", "épöque 3", "-x", "a\nb", ".hidden", "*"])
def test_any_name_of_a_folder_is_a_tag(tag: str, tmp_path: Path) -> None:
    folder = open_storage(tmp_path / "out")
    assert read_marker(folder, tag) is None
    check_place(str(tmp_path / "out"), tag)
    write_marker(folder, tag, MARKER)
    assert read_marker(folder, tag) == MARKER
    assert (tmp_path / "out" / tag / "spotspeed.json").is_file()


@pytest.mark.parametrize("tag", ["", ".", "..", "../x", "a//b", "/etc/x", "a\0b", "x" * 300])
def test_what_names_no_folder_below_is_refused_before_anything_is_stored(
    tag: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError):
        check_place(str(tmp_path / "out"), tag)
    with pytest.raises(SpotSpeedError):
        write_marker(open_storage(tmp_path / "out"), tag, MARKER)


@pytest.mark.parametrize("tag", ["", "..", "../x", "/etc/x"])
def test_where_no_marker_can_be_there_is_none(tag: str, tmp_path: Path) -> None:
    assert read_marker(LocalStorage(tmp_path), tag) is None


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the user")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError):
            check_place(str(folder), "tag")


def test_no_rank_waits_for_one_that_failed_in_a_way_that_nobody_foresaw() -> None:
    said: list[bytes] = []

    def exchange(label: str, value: bytes) -> list[bytes]:
        said.append(value)
        return [value, b'{"error": ""}']

    def fail() -> dict[str, int]:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        share(exchange, "label", 0, fail)
    with pytest.raises(SpotSpeedError, match="rank 0: TypeError"):
        share(lambda label, value: [said[0], value], "label", 1, fail)
    with pytest.raises(TypeError, match="a bug"):
        all_or_none(exchange, "label", fail)
    assert "a bug" in json.loads(said[1])["text"]
