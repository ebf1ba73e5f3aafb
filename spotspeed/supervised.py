"""What a rank tells the supervisor above it, which may see nothing but the launcher's exit code.

Each line of the file named by SPOTSPEED_SUPERVISED is one JSON object. The same variable marks the
processes of a launch. Without it, or on another host than the supervisor's, nothing happens.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

VARIABLE = "SPOTSPEED_SUPERVISED"


def tell(**facts: Any) -> None:
    """Append `facts`, and this process's id, to the supervisor's file, if there is one."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    line = json.dumps({"pid": os.getpid(), **facts}).encode() + b"\n"
    # A supervisor that is gone, or on another host, does not read it.
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(file, line)
        finally:
            os.close(file)


def heard(path: str) -> Iterator[dict[str, Any]]:
    """What has been told so far, in order; a line that is being written is left out."""
    with open(path, "rb") as file:
        for line in file.read().split(b"\n")[:-1]:
            try:
                facts = json.loads(line)
            except ValueError:
                continue
            if isinstance(facts, dict):
                yield facts
