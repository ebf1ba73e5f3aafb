"""The levels that a checkpoint reaches, and what the tier of a node may let go."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from spotspeed.core.lineage import Place

Level = Literal["process", "node", "remote"]
"""What a save survives: the ranks (staged in the saver), the saver and a reboot (on the node's own
disk), the node (sealed at `path`)."""


@dataclass(frozen=True, slots=True)
class Cached:
    """One checkpoint's parts in the tier of a node; pending while `path` has not all of them."""

    directory: str
    place: Place
    is_pending: bool


def node_directory(url: str) -> str:
    """Name, below `local_path`, of the directory with this node's parts of the store `url`.

    `url` must be the spelling by which all processes of the node find one saver.
    """
    return f"run-{hashlib.sha256(url.encode()).hexdigest()[:24]}"


def plan_eviction(cached: Iterable[Cached], newest_durable: Place | None) -> tuple[str, ...]:
    """Directories that the node's tier need not hold any more, oldest first.

    Whatever is older than the newest checkpoint known to be sealed at `path`, unless a part of it
    is still to be drained. Nothing goes before something newer is durable there.
    """
    if newest_durable is None:
        return ()
    gone = [item for item in cached if item.place < newest_durable and not item.is_pending]
    return tuple(item.directory for item in sorted(gone, key=lambda item: item.place))
