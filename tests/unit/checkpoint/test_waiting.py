"""How long the ranks wait for one another."""

from __future__ import annotations

import json
from types import SimpleNamespace

from spotspeed.checkpoint.agreement import PATIENCE_S
from spotspeed.checkpoint.queue import SaveHandle
from spotspeed.core.manifest import Ticket
from spotspeed.dropin import wait_all


def test_a_rank_that_is_done_waits_for_one_that_writes_longer_than_anything_else() -> None:
    waited: list[float] = []

    def exchange(label: str, value: bytes, timeout_s: float = PATIENCE_S) -> list[bytes]:
        waited.append(timeout_s)
        return [value, json.dumps({"error": ""}).encode()]

    handle = SaveHandle(Ticket(1, 2, "x1", "tag", "explicit", 2, 0, None))
    handle.stored_completion.set_result(None)
    handle.upload_completion.set_result("the manifest")  # type: ignore[arg-type]
    wait_all(SimpleNamespace(exchange=exchange), handle)  # type: ignore[arg-type]
    assert len(waited) == 2 and min(waited) > 10 * PATIENCE_S
