"""The staging pool of a rank: equal slots of an arena whose size is fixed when it is created."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from spotspeed.core.chunks import LARGEST_CHUNK_BYTES, PAGE_BYTES, choose_chunk_bytes
from spotspeed.errors import PoolExhaustedError, SpotSpeedError

MIN_SLOTS = 4
"""Below this, filling, encoding and writing would take turns instead of overlapping."""
SECTION_SLACK = 24
"""Spare slots for chunks that end a section and for blobs, when the whole share is to fit."""
MEMORY_SHARE = 0.5
"""Part of the node's free memory that its pools may take when nothing is configured."""


class SlotPool:
    """Which slots of an arena are free; any thread may acquire and release."""

    def __init__(self, slot_count: int) -> None:
        self.slot_count = slot_count
        self._free = deque(range(slot_count))
        self._is_out = [False] * slot_count
        self._changed = threading.Condition()
        self._error: SpotSpeedError | None = None

    @property
    def free_count(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def acquire(
        self, *, give_up: Callable[[], bool] = lambda: False, timeout_s: float | None = None
    ) -> int | None:
        """Take a free slot, waiting for one; None when `give_up()` or after `timeout_s`.

        `give_up` is asked again after every `wake`. Raises what `fail` was given.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._free or self._error is not None or give_up(), timeout_s
            )
            if self._error is not None:
                raise self._error
            if give_up() or not self._free:
                return None
            slot = self._free.popleft()
            self._is_out[slot] = True
            return slot

    def release(self, slots: Iterable[int]) -> None:
        """Give slots back; ValueError for one that is not out."""
        with self._changed:
            for slot in slots:
                if not 0 <= slot < self.slot_count or not self._is_out[slot]:
                    raise ValueError(f"slot {slot} of {self.slot_count} is not in use")
                self._is_out[slot] = False
                self._free.append(slot)
            self._changed.notify_all()

    def wake(self) -> None:
        """Let waiting threads ask their `give_up` again."""
        with self._changed:
            self._changed.notify_all()

    def fail(self, error: SpotSpeedError) -> None:
        """Make every present and later `acquire` raise `error`."""
        with self._changed:
            self._error = error
            self._changed.notify_all()


def choose_slot_bytes(share_bytes: int) -> int:
    """Slot size for a rank that saves `share_bytes`: the size of its chunks."""
    return choose_chunk_bytes(share_bytes)


def choose_arena_bytes(
    share_bytes: int,
    *,
    host_memory_bytes: int | None,
    available_bytes: int,
    local_world_size: int,
) -> tuple[int, str]:
    """Size of one rank's arena, a multiple of the slot size, and why it is that.

    It is the whole share where memory allows.

    `share_bytes` is what this rank writes in one save; `host_memory_bytes` the configured pool of
    the whole node (null: half of what is free), which `local_world_size` ranks divide. Raises
    PoolExhaustedError when not even MIN_SLOTS slots fit.
    """
    slot_bytes = choose_slot_bytes(share_bytes)
    wanted = -(-share_bytes // slot_bytes) + SECTION_SLACK
    limit = host_memory_bytes or int(available_bytes * MEMORY_SHARE)
    allowed = min(limit, available_bytes) // local_world_size // slot_bytes
    if allowed < MIN_SLOTS:
        raise PoolExhaustedError(
            f"the staging pool of a rank needs {MIN_SLOTS * slot_bytes} bytes at least, and "
            f"{allowed * slot_bytes} are allowed: the node has {available_bytes} bytes free, its "
            f"pools may take {limit}, and {local_world_size} ranks share them; set "
            f"staging.host_memory_gb to {needed_gb(slot_bytes, local_world_size):.3f} or more, or "
            f"free memory on the node"
        )
    if wanted <= allowed:
        return wanted * slot_bytes, "a whole save of this rank fits"
    free = f"the {available_bytes} bytes that the node has free"
    limited = "staging.host_memory_gb" if host_memory_bytes else f"half of {free}"
    limited = free if limit > available_bytes else limited
    return allowed * slot_bytes, f"{limited}, divided among {local_world_size} ranks of the node"


def needed_gb(slot_bytes: int, local_world_size: int) -> float:
    """The smallest `staging.host_memory_gb` that a node of so many ranks can work with."""
    return MIN_SLOTS * slot_bytes * local_world_size / 1e9


def available_memory_bytes() -> int:
    """Memory that this node's control group and the kernel would still give, in bytes."""
    return min(_kernel_available(), _cgroup_available())


def _kernel_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 64 * LARGEST_CHUNK_BYTES


def _cgroup_available() -> int:
    """What the nearest limited control group (version 2) leaves; unlimited when there is none."""
    unlimited = 1 << 62
    try:
        relative = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        group = Path("/sys/fs/cgroup") / relative.lstrip("/")
        least = unlimited
        while group.is_relative_to("/sys/fs/cgroup"):
            least = min(least, _group_available(group, unlimited))
            group = group.parent
    except (OSError, ValueError):
        return unlimited
    return least


def _group_available(group: Path, unlimited: int) -> int:
    limit_file = group / "memory.max"
    if not limit_file.exists():
        return unlimited
    limit = limit_file.read_text().strip()
    if limit == "max":
        return unlimited
    used = int((group / "memory.current").read_text())
    cache = _file_cache_bytes((group / "memory.stat").read_text())
    return max(0, int(limit) - used + cache)


def _file_cache_bytes(stat: str) -> int:
    """Page cache that the group could drop."""
    for line in stat.splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0


assert LARGEST_CHUNK_BYTES % PAGE_BYTES == 0
