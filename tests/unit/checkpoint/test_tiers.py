"""What can be the tier of a node, and what is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spotspeed.checkpoint.tiers import check_local_path, is_wanted, open_node, survey
from spotspeed.cli import app
from spotspeed.core.lineage import Place
from spotspeed.core.tiers import Cached, plan_eviction
from spotspeed.errors import ConfigError
from spotspeed.storage.local import LocalStorage


def test_a_directory_apart_from_the_store_is_taken_and_left_as_it_was(tmp_path: Path) -> None:
    check_local_path(str(tmp_path / "nvme"), str(tmp_path / "store"))
    check_local_path(str(tmp_path / "nvme"), "s3://bucket/run")
    assert list((tmp_path / "nvme").iterdir()) == []


@pytest.mark.parametrize(("local_path", "path", "relation"), [
    ("store", "store", "is"), ("store/fast", "store", "lies inside"),
    ("nvme", "nvme/store", "contains"), ("link/fast", "store", "lies inside"),
])  # fmt: skip
def test_a_directory_that_overlaps_the_store_is_refused(
    tmp_path: Path, local_path: str, path: str, relation: str
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "store")
    with pytest.raises(ConfigError, match=rf"`local_path` .* {relation} `path`"):
        check_local_path(str(tmp_path / local_path), str(tmp_path / path))


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written on this node"):
        check_local_path(str(tmp_path / "file" / "nvme"), str(tmp_path / "store"))


def test_a_mark_that_is_damaged_says_nothing(tmp_path: Path, save_small) -> None:
    node = open_node(str(tmp_path / "nvme"), str(tmp_path / "store"))
    ticket = save_small(node, 1, 10)
    node.put(f"{ticket.directory}/sealed.json", b"\xff")
    (found,) = survey(node)
    assert not found.is_sealed and [part.rank for part in found.parts] == [0, 1]


def test_a_damaged_receipt_is_told_and_the_others_are_used(tmp_path: Path, save_small) -> None:
    node = open_node(str(tmp_path / "nvme"), str(tmp_path / "store"))
    ticket = save_small(node, 1, 10)
    node.put(ticket.receipt_path(0), b"{}")
    (found,) = survey(node)
    assert [part.rank for part in found.parts] == [1]
    assert ticket.receipt_path(0) in found.causes[0]


def test_what_a_newer_checkpoint_has_overtaken_is_not_wanted_but_by_name(
    tmp_path: Path, save_small, seal_small
) -> None:
    storage, node = LocalStorage(tmp_path / "store"), LocalStorage(tmp_path / "node")
    seal_small(storage, 1, 20)
    assert not is_wanted(storage, save_small(node, 1, 10))
    assert is_wanted(storage, save_small(node, 1, 30))
    assert is_wanted(storage, save_small(node, 1, 10, reason="explicit"))


def test_only_what_is_older_than_something_durable_and_drained_goes() -> None:
    held = [Cached("new", Place(2, 30), False), Cached("old", Place(1, 10), False),
            Cached("older", Place(1, 5), False), Cached("waiting", Place(1, 7), True)]  # fmt: skip
    assert plan_eviction(held, None) == ()
    assert plan_eviction(held, Place(2, 30)) == ("older", "old")
    assert plan_eviction(held, Place(1, 5)) == ()


def test_the_command_line_says_what_level_each_checkpoint_has_reached(
    tmp_path: Path, save_small, seal_small
) -> None:
    path, local = str(tmp_path / "store"), str(tmp_path / "nvme")
    sealed = seal_small(LocalStorage(path), 1, 10)
    node = open_node(local, path)
    save_small(node, 1, 10, ranks=[1])
    waiting = save_small(node, 1, 20, ranks=[1])
    told = CliRunner().invoke(app, ["list", path, "--local", local])
    assert f"level node: {waiting.directory}, ranks 1" in told.output
    listed = json.loads(CliRunner().invoke(app, ["list", path, "--local", local, "--json"]).output)
    assert [info["level"] for info in listed["sealed"]] == ["remote"]
    assert listed["on_this_node"] == {sealed.directory: [1], waiting.directory: [1]}
    shown = CliRunner().invoke(app, ["show", path, sealed.tag, "--local", local, "--json"])
    document = json.loads(shown.output)
    assert (document["level"], document["ranks_on_this_node"]) == ("remote", [1])
