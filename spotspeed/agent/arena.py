"""The memory that the saver lends to one rank: an anonymous file of fixed size, cut into slots."""

from __future__ import annotations

import logging
import threading

from spotspeed.agent.process import lower_priority
from spotspeed.core.saver_protocol import MAX_SLOTS, Hello
from spotspeed.errors import FormatError, PoolExhaustedError
from spotspeed.staging.native import Arena

_PREFAULT_BYTES = 64 * 1024 * 1024
_PAGE_BYTES = 4096
_logger = logging.getLogger("spotspeed")


class SlotArena:
    """An anonymous file shared with one rank; gone with the last process that maps it."""

    def __init__(self, size_bytes: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.slot_count = size_bytes // slot_bytes
        self.size_bytes = self.slot_count * slot_bytes
        self._arena = Arena.create(self.size_bytes)
        self._view = memoryview(self._arena)

    @property
    def descriptor(self) -> int:
        """The file, to be passed to the rank; valid as long as this object."""
        return self._arena.fd

    def prefault(self) -> None:
        """Have the kernel allocate the pages, on a thread, so that the rank's copies find them."""
        arguments = (self._arena, self.size_bytes)
        threading.Thread(target=_allocate, args=arguments, name="prefault", daemon=True).start()

    def view(self, slot: int, size_bytes: int) -> memoryview:
        """The first `size_bytes` bytes of a slot."""
        start = slot * self.slot_bytes
        return self._view[start : start + size_bytes]


def create_arena(hello: Hello, available_bytes: int) -> SlotArena | None:
    """The arena that `hello` asks for, None for an observer.

    Raises FormatError for sizes that make no sense, PoolExhaustedError when memory is short.
    """
    if hello.arena_bytes == 0:
        return None
    slot_bytes = hello.slot_bytes
    if slot_bytes <= 0 or slot_bytes % _PAGE_BYTES or hello.arena_bytes < slot_bytes:
        raise FormatError(f"an arena of {hello.arena_bytes} bytes in slots of {slot_bytes}")
    if hello.arena_bytes // slot_bytes > MAX_SLOTS:
        raise FormatError(f"an arena of {hello.arena_bytes // slot_bytes} slots")
    if hello.arena_bytes > available_bytes:
        raise PoolExhaustedError(
            f"rank {hello.rank} asks for a staging pool of {hello.arena_bytes} bytes and this node "
            f"has {available_bytes} free: set staging.host_memory_gb lower"
        )
    try:
        return SlotArena(hello.arena_bytes, slot_bytes)
    except OSError as error:
        raise PoolExhaustedError(
            f"rank {hello.rank} asks for a staging pool of {hello.arena_bytes} bytes, which this "
            f"node refuses: {error.strerror or error}. It is memory, but counts as a file: allow "
            f"files of that size (ulimit -f), or set staging.host_memory_gb lower"
        ) from error


def _allocate(arena: Arena, size_bytes: int) -> None:
    lower_priority()  # The training starts meanwhile: it restores, or makes its own memory.
    try:
        for start in range(0, size_bytes, _PREFAULT_BYTES):
            arena.prefault(start, min(_PREFAULT_BYTES, size_bytes - start))
    except OSError as error:
        _logger.warning("the arena's memory could not be allocated in advance: %s", error)
