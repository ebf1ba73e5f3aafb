"""How a save is announced to the saver: what it has in common with the last is told only once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from spotspeed.core.chunks import StreamLayout, join
from spotspeed.core.described import Described, common_count, lay_out
from spotspeed.core.layout import Fragment
from spotspeed.core.saver_protocol import Begin, Describe, Message
from spotspeed.staging.copy_plan import Geometry


@dataclass(frozen=True, slots=True)
class Announced:
    """The layout of a save's chunks, the same on both sides, and its geometry."""

    layout: StreamLayout
    geometry: Geometry


class Announcer:
    """Announces the saves of one session; any thread may announce one.

    Thousands of fragments take a while to describe, to lay out and to send, and hardly ever
    change. They are compared with the last save's, which is quick where they are the same objects.
    """

    def __init__(self, send: Callable[[Message], None], chunk_bytes: int) -> None:
        self._send, self._chunk_bytes = send, chunk_bytes
        self._lock = threading.Lock()
        self._number = 0
        self._described = Described((), chunk_bytes, StreamLayout((), (), ()), frozenset())
        self._geometry = Geometry.of(self._described.layout)

    def announce(self, begin: Begin) -> Announced:
        """Send `begin`, whose fragments are complete and whose sizes are filled in here.

        Raises StorageError when the saver is gone, InvalidLayoutError for fragments that overlap.
        """
        counts = [item.fragment_count for item in begin.objects]
        head = sum(counts)
        stop = max(head, common_count(begin.fragments))
        rest = (*begin.fragments[:head], *begin.fragments[stop:])
        with self._lock:
            if begin.fragments[head:stop] != self._described.fragments:
                self._describe(begin.fragments[head:stop])
            described, number = self._described, self._number
            found = self._lay_out(rest, counts)
            layout = found.layout
            self._send(replace(
                begin, chunk_bytes=self._chunk_bytes, chunk_count=len(layout.chunks),
                raw_bytes=layout.raw_bytes, fragments=rest,
                described=number if described.fragments else 0,
            ))  # fmt: skip
        return found

    def _describe(self, fragments: tuple[Fragment, ...]) -> None:
        described = Described.of(fragments, chunk_bytes=self._chunk_bytes)
        geometry = Geometry.of(described.layout)
        if fragments:
            self._send(Describe(self._number + 1, self._chunk_bytes, fragments))
            self._number += 1
        self._described, self._geometry = described, geometry

    def _lay_out(self, rest: tuple[Fragment, ...], counts: list[int]) -> Announced:
        described = self._described
        shard = described.extend(rest) if not counts else ()
        if len(shard) != 2:
            layout = join(lay_out(described, rest, counts), counts)
            return Announced(layout, Geometry.of(layout))
        common, more = shard
        count = len(described.fragments)
        geometry = self._geometry.then(
            Geometry.of(more), raw_bytes=common.raw_bytes, source_count=count
        )
        return Announced(described.shard(shard), geometry)
