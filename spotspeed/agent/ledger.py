"""Who holds which slot of an arena: the rank, a chunk not yet written, or a chunk written but kept.

Slots of written chunks are kept while the rank does not need them: as long as all of a save's
chunks are still in memory, a failed write can be repeated from the beginning.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from spotspeed.errors import FormatError


class SlotLedger:
    """The slots of one arena that the saver holds; `free` hands them back to the rank."""

    def __init__(self, slot_count: int, free: Callable[[Sequence[int]], None]) -> None:
        self._slot_count = slot_count
        self._free = free
        self._holder: dict[int, int] = {}
        self._written: deque[int] = deque()
        self._wanted = 0
        self._unrepeatable: set[int] = set()
        self._lock = threading.Lock()

    @property
    def held_count(self) -> int:
        """Slots that are not the rank's."""
        return len(self._holder)

    def take(self, save: int, slots: Iterable[int]) -> None:
        """The rank hands slots over with chunks of `save`; FormatError when they are not its."""
        with self._lock:
            for slot in slots:
                if slot >= self._slot_count or slot in self._holder:
                    raise FormatError(f"slot {slot} of {self._slot_count} is not the rank's")
                self._holder[slot] = save

    def written(self, slots: Iterable[int]) -> None:
        """Chunks have been written; their slots are kept, or freed when the rank waits for some.

        Harmless when they have meanwhile been given up with their save.
        """
        with self._lock:
            self._written += (slot for slot in slots if slot in self._holder)
            self._give(self._claim())

    def need(self, count: int) -> None:
        """The rank waits: give it `count` slots, those kept at once, others when written."""
        with self._lock:
            self._wanted = count
            self._give(self._claim())

    def settle(self, save: int) -> None:
        """Nothing of `save` will be read any more: all its slots go back."""
        with self._lock:
            slots = [slot for slot, holder in self._holder.items() if holder == save]
            gone = set(slots)
            self._written = deque(slot for slot in self._written if slot not in gone)
            self._unrepeatable.discard(save)
            self._give(slots)

    def is_repeatable(self, save: int) -> bool:
        """Whether every chunk of `save` that came is still in memory."""
        with self._lock:
            return save not in self._unrepeatable

    def _claim(self) -> list[int]:
        """Kept slots for the rank's need, oldest first."""
        slots = [self._written.popleft() for _ in range(min(self._wanted, len(self._written)))]
        self._unrepeatable.update(self._holder[slot] for slot in slots)
        return slots

    def _give(self, slots: list[int]) -> None:
        if not slots:
            return
        for slot in slots:
            del self._holder[slot]
        self._wanted = max(0, self._wanted - len(slots))
        self._free(slots)
