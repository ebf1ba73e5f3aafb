"""What `spotspeed certify` asks of a launch: how many steps, where to save, where to log.

It travels in the environment variable SPOTSPEED_REHEARSAL, as a JSON object.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

from spotspeed.errors import ConfigError

VARIABLE = "SPOTSPEED_REHEARSAL"
TAG = "certified"
"""Of the checkpoint that a rehearsal ends with."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What one launch of a rehearsal does."""

    path: str
    """Where it saves, and restores from unless `is_first`; instead of the block's path."""
    steps: int
    """Optimizer updates until it saves and ends."""
    log: str
    """Directory for the losses, a file a rank."""
    is_first: bool
    """Restore from the block's own path, which is only read."""

    def encode(self) -> str:
        """The value of the environment variable."""
        return json.dumps(asdict(self))


def rehearsal_here() -> Rehearsal | None:
    """The rehearsal that this process is part of, if any; ConfigError when it is garbled."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        return Rehearsal(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{VARIABLE}: not the rehearsal of a launch: {error}") from error
