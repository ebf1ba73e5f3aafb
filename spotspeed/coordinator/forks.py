"""Lets objects with descriptors give them up in forked children, such as DataLoader workers.

A child that keeps a rank's connections open hides the rank's death from the others, and one that
keeps its wakeup descriptor wakes the parent for signals of its own.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class ForkAware(Protocol):
    """Owns descriptors that a forked child must not share."""

    def abandon_in_child(self) -> None:
        """Called in the child right after the fork; must only close and forget."""
        ...


_live: weakref.WeakSet[ForkAware] = weakref.WeakSet()


def abandon_on_fork(owner: ForkAware) -> None:
    """Call `owner.abandon_in_child()` in every child forked while `owner` is alive."""
    _live.add(owner)


def _abandon_all() -> None:
    owners = tuple(_live)
    _live.clear()
    for owner in owners:
        owner.abandon_in_child()


os.register_at_fork(after_in_child=_abandon_all)
