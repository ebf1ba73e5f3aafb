"""The saver may be done before the rank that staged the save has said so to itself."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from spotspeed.checkpoint.ownership import claim_epoch
from spotspeed.config import parse_block
from spotspeed.core.saver_protocol import End, Message
from spotspeed.staging.client import SaverSession
from spotspeed.staging.outbox import OnSent
from spotspeed.staging.staged import StagedSave
from spotspeed.staging.stager import Stager
from spotspeed.storage.local import LocalStorage
from tests.distributed.drivers.saver_rank import pieces_of, ticket_of
from tests.distributed.saver_ranks import wait_gone

LIMIT_S = 60.0


def test_a_save_that_is_sealed_at_once_is_also_staged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_known, saves = threading.Event(), list[StagedSave]()
    send = SaverSession.send

    def send_slowly(session: SaverSession, message: Message, on_sent: OnSent | None = None) -> None:
        if not isinstance(message, End):
            return send(session, message, on_sent)
        send(session, message)
        assert is_known.wait(LIMIT_S)
        saves[0].upload_completion.result(LIMIT_S)
        assert on_sent is not None
        on_sent()

    monkeypatch.setattr(SaverSession, "send", send_slowly)
    claim_epoch(LocalStorage(str(tmp_path)))
    stager = Stager(str(tmp_path), parse_block({"path": str(tmp_path)}), 0)
    try:
        stager.reserve(4 * 4 * 1000)
        saves.append(stager.stage(ticket_of(1, 1), pieces_of(1, 0, 4, 1000), {}))
        is_known.set()
        assert saves[0].wait_staged(LIMIT_S)
        assert saves[0].staging_completion.result(0).size_bytes >= 4 * 4 * 1000
        assert saves[0].stored_completion.done()
        session = stager._session
        assert session is not None
    finally:
        stager.close()
    wait_gone(session.saver_pid)
