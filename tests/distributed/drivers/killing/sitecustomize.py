"""Loaded by a saver that a test starts: kills what the test chose at a labelled point of a save.

KILL_POINT names the point, and the file KILL_VICTIMS lists process ids; "saver" is this process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARD, RECEIPT = "rank-00001.shard", "rank-00001.receipt"


def _before(owner: type, method: str, is_it: Callable[..., bool]) -> None:
    """Strike when `owner.method` is called with arguments for which `is_it` holds."""
    original = getattr(owner, method)

    def struck(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_it(self, *args):
            for word in Path(os.environ["KILL_VICTIMS"]).read_text().split():
                os.kill(os.getpid() if word == "saver" else int(word), signal.SIGKILL)
        return original(self, *args, **kwargs)

    setattr(owner, method, struck)


def _arm(point: str) -> None:
    from spotspeed.storage.local import LocalStorage
    from spotspeed.storage.local_writer import LocalWriter

    if point == "mid-write":
        _before(LocalWriter, "write_all", lambda file, *_: file.position and SHARD in file._place)
    elif point == "before the receipt":
        _before(LocalStorage, "put", lambda _, key, *__: key.endswith(RECEIPT))
    elif point == "before the seal":
        _before(LocalStorage, "create", lambda _, key, *__: key.endswith("manifest.json"))


if "KILL_POINT" in os.environ and "KILL_VICTIMS" in os.environ:
    _arm(os.environ["KILL_POINT"])
