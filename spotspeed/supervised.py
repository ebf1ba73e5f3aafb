"""What a rank tells the supervisor above it, which may see nothing but the launcher's exit code.

Each line of the file named by SPOTSPEED_SUPERVISED is one JSON object. The same variable marks the
processes of a launch. Without it, or on another host than the supervisor's, nothing happens.

A second variable holds the same: `deepspeed` over pdsh gives its ranks, on this host too, only what
begins with PYTHON and a few other words (EXPORT_ENVS in deepspeed/launcher/runner.py).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

VARIABLE = "SPOTSPEED_SUPERVISED"
EXPORTED = "PYTHON_SPOTSPEED_SUPERVISED"
VARIABLES = (VARIABLE, EXPORTED)


def record_here() -> str | None:
    """The file of the supervisor above this process, if there is one."""
    return next(filter(None, map(os.environ.get, VARIABLES)), None)


def tell(**facts: Any) -> None:
    """Append `facts`, and this process's id, to the supervisor's file, if there is one."""
    path = record_here()
    if path is None:
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


def write_order(path: str, *, deadline_s: float | None) -> None:
    """Begin the record of a launch; `deadline_s` is what its notices leave, where that is stated.

    Only this user reads or writes it.
    """
    order = b"" if deadline_s is None else json.dumps({"deadline_s": deadline_s}).encode() + b"\n"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(order)


def ordered_deadline_s() -> float | None:
    """What the supervisor's notices leave time for; None when nobody has stated it."""
    path = record_here()
    # Another host has no such file.
    with contextlib.suppress(OSError, TypeError, ValueError):
        for facts in heard(path) if path is not None else ():
            return float(facts["deadline_s"]) if "pid" not in facts else None
    return None
