"""What the saver measures of a store decides how the next save is stored there."""

from __future__ import annotations

from pathlib import Path

import pytest

from spotspeed.agent.choosing import Chooser
from spotspeed.core import compression
from spotspeed.storage.intercept import InterceptedStorage
from spotspeed.storage.local import LocalStorage
from spotspeed.storage.throttle import Throttle
from tests.unit.agent.node_rig import Node, ticket_of


def test_a_slow_directory_is_found_out_and_the_next_save_is_compressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a path like any other, but what is behind it takes 20 MB a second."""
    monkeypatch.setattr(compression, "ENOUGH_BYTES", 1 << 20)
    slow = InterceptedStorage(LocalStorage(tmp_path / "nfs"), Throttle(20e6))
    node = Node(slow, tmp_path / "node")
    assert not node.chooser.is_encoded()
    caplog.set_level("INFO", logger="spotspeed")
    sizes = []
    for step in (1, 2):
        save, part = node.store(ticket_of(step), is_direct=True, compression="")
        assert part is None and save.cost is not None
        sizes.append(save.cost.stored_bytes)
    assert node.chooser.is_encoded()
    assert sizes[1] < 0.5 * sizes[0]
    assert "compressed from now on: the store takes" in caplog.text


def test_a_url_is_taken_for_a_slow_store_and_a_directory_for_a_fast_one() -> None:
    assert Chooser("s3://bucket/run", 2).is_encoded()
    assert not Chooser("/shared/run", 2).is_encoded()
    assert Chooser("/shared/run", 2).is_encoded(1e6), "the tier has measured it"
