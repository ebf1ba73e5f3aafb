"""How long the ranks wait for one another."""

from __future__ import annotations

import json
from types import SimpleNamespace

from spotspeed.checkpoint.agreement import PATIENCE_S, ROUND_BYTES, share_large
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


def test_what_is_too_long_for_one_message_is_told_in_rounds() -> None:
    mine, theirs = {"names": ["x" * 60] * 20_000}, {"names": []}
    other, rounds = json.dumps(theirs).encode(), []

    def exchange(label: str, value: bytes) -> list[bytes]:
        rounds.append(len(value))
        if label == "mesh":
            return [value, str(len(other)).encode()]
        start = int(label.rpartition(" ")[2])
        return [value, other[start : start + ROUND_BYTES // 2]]

    assert share_large(exchange, "mesh", mine) == [mine, theirs]
    assert max(rounds) <= ROUND_BYTES // 2 and len(rounds) == 4
