"""Host copies, shared staging memory and device copies, from the native extension.

The extension works on addresses; this module is where addresses are made from buffers, with the
bounds of every buffer checked, and where whatever owns the memory is kept alive. Everything here
releases the GIL while bytes move. Headers in csrc/ state lifetimes and thread rules in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spotspeed._native import (
    Arena,
    CopyCancelledError,
    CopyEngine,
    CopyHandle,
    DeviceCopyEngine,
    DeviceError,
    DeviceHandle,
    RegisteredMemory,
    TwinCopyEngine,
    cuda_built,
    cuda_device_count,
    join_planes,
    split_planes,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "Arena", "CopyCancelledError", "CopyEngine", "CopyHandle", "DeviceCopyEngine", "DeviceError",
    "DeviceHandle", "MemoryRange", "RegisteredMemory", "TwinCopyEngine", "buffer_range",
    "copy_gather", "copy_scatter", "cuda_available", "cuda_built", "cuda_device_count", "gather",
    "join_planes", "split_planes", "submit_gather", "submit_scatter",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class MemoryRange:
    """`size_bytes` of memory at `address`; whoever makes one vouches for it and keeps it alive."""

    address: int
    size_bytes: int

    def __post_init__(self) -> None:
        if self.size_bytes < 0 or self.address < 0 or (self.size_bytes and not self.address):
            raise ValueError(f"no memory range: {self.size_bytes} bytes at {self.address:#x}")

    def narrow(self, offset: int, size_bytes: int) -> MemoryRange:
        """The part at `offset`; raises ValueError when it does not lie inside."""
        if not 0 <= offset <= offset + size_bytes <= self.size_bytes:
            raise ValueError(
                f"[{offset}, +{size_bytes}) is not inside a range of {self.size_bytes} bytes"
            )
        return MemoryRange(self.address + offset, size_bytes)


def buffer_range(buffer: Buffer, *, writable: bool = False) -> MemoryRange:
    """Where `buffer` lies; valid while `buffer` lives. Raises ValueError unless it fits."""
    view = memoryview(buffer)
    if not view.contiguous or (writable and view.readonly):
        raise ValueError(f"a contiguous{' writable' if writable else ''} buffer is needed")
    if view.nbytes == 0:
        return MemoryRange(0, 0)
    import numpy as np  # A third of what the saver, which never comes here, takes to start.

    return MemoryRange(np.frombuffer(view.cast("B"), dtype=np.uint8).ctypes.data, view.nbytes)


def gather(sources: Sequence[MemoryRange], target: MemoryRange) -> list[tuple[int, int, int]]:
    """The copies that lay `sources` end to end from the start of `target`.

    Raises ValueError when they do not fit; bytes of `target` behind them are left alone.
    """
    copies, offset = [], 0
    for source in sources:
        place = target.narrow(offset, source.size_bytes)
        if source.size_bytes:
            copies.append((source.address, place.address, source.size_bytes))
        offset += source.size_bytes
    return copies


def copy_gather(engine: CopyEngine, sources: Sequence[MemoryRange], target: Buffer) -> int:
    """Copy `sources` end to end into `target` and return the bytes copied."""
    return engine.copy(gather(sources, buffer_range(target, writable=True)))


def copy_scatter(engine: CopyEngine, source: Buffer, targets: Sequence[MemoryRange]) -> int:
    """Copy the start of `source` to `targets`, one after the other; return the bytes copied."""
    return engine.copy(_reverse(gather(targets, buffer_range(source))))


def submit_gather(
    engine: CopyEngine, sources: Sequence[MemoryRange], target: Buffer, *, keep: object = None
) -> CopyHandle:
    """Like `copy_gather`, returning at once; `keep` and `target` live as long as the handle.

    Dropping an unfinished handle cancels its copies first.
    """
    copies = gather(sources, buffer_range(target, writable=True))
    return engine.submit(copies, keep=(keep, memoryview(target)))


def submit_scatter(
    engine: CopyEngine, source: Buffer, targets: Sequence[MemoryRange], *, keep: object = None
) -> CopyHandle:
    """Like `copy_scatter`, returning at once; `keep` and `source` live as long as the handle."""
    copies = _reverse(gather(targets, buffer_range(source)))
    return engine.submit(copies, keep=(keep, memoryview(source)))


def cuda_available() -> bool:
    """Whether this build has CUDA kernels and this process a GPU to run them on."""
    return cuda_device_count() > 0


def _reverse(copies: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    return [(target, source, size) for source, target, size in copies]
