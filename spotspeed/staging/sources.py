"""Where the bytes of a save come from, and the copies that lay them into slots."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from spotspeed.core.chunks import StreamLayout
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.errors import CaptureError
from spotspeed.staging.native import CopyEngine, CopyHandle

if TYPE_CHECKING:
    import torch

Copy = tuple[int, int, int]
"""(source address, target address, bytes)."""
_ZEROS = np.zeros(4096, dtype=np.uint8)


class Source(Protocol):
    """The bytes of one fragment; kept alive by whoever holds the source."""

    size_bytes: int

    def copy_to(self, address: int, offset: int, size_bytes: int) -> None:
        """Begin to copy `size_bytes` bytes from `offset` to memory at `address`."""

    def finish(self) -> None:
        """Return when all copies begun have arrived."""


@dataclass(slots=True)
class HostSource:
    """Bytes in this process's memory; `owner` keeps them alive."""

    address: int
    size_bytes: int
    owner: Any

    def copy_to(self, address: int, offset: int, size_bytes: int) -> None:
        ctypes.memmove(address, self.address + offset, size_bytes)

    def finish(self) -> None:
        return


class DeviceQueue:
    """Copies out of one accelerator, after what was queued on it when this object was made.

    On CUDA they run on a stream of their own; elsewhere on the device's default stream.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self._stream: Any = None
        if device.type == "cuda":
            cuda: Any = torch.cuda
            self._stream = cuda.Stream(device)
            self._stream.wait_stream(cuda.current_stream(device))

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Queue a copy; asynchronous on CUDA where `target` lies in page-locked memory."""
        import torch

        if self._stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def finish(self) -> None:
        """Return when all copies have arrived."""
        if self._stream is not None:
            self._stream.synchronize()


class DeviceSource:
    """Bytes in an accelerator's memory."""

    def __init__(self, tensor: torch.Tensor, queue: DeviceQueue) -> None:
        import torch

        self._bytes = tensor.detach().view(torch.uint8)
        self._queue = queue
        self.size_bytes = self._bytes.numel()

    def copy_to(self, address: int, offset: int, size_bytes: int) -> None:
        import torch

        buffer = (ctypes.c_char * size_bytes).from_address(address)
        target = torch.frombuffer(buffer, dtype=torch.uint8)
        self._queue.copy(self._bytes.narrow(0, offset, size_bytes), target)

    def finish(self) -> None:
        self._queue.finish()


def gather(
    pieces: Sequence[tuple[Fragment, torch.Tensor]], blobs: Mapping[TensorKey, bytes]
) -> tuple[list[Fragment], list[Source]]:
    """Fragments of a save and where each one's bytes are; raises CaptureError for a bad tensor."""
    fragments: list[Fragment] = []
    sources: list[Source] = []
    queues: dict[torch.device, DeviceQueue] = {}
    for fragment, tensor in pieces:
        _check_tensor(fragment, tensor)
        fragments.append(fragment)
        if tensor.device.type == "cpu":
            sources.append(HostSource(tensor.data_ptr(), fragment.size_bytes, tensor))
            continue
        if tensor.device not in queues:
            queues[tensor.device] = DeviceQueue(tensor.device)
        sources.append(DeviceSource(tensor, queues[tensor.device]))
    for key, data in blobs.items():
        size = len(data)
        fragments.append(Fragment(key, "uint8", (size,), Interval(0, size)))
        view = np.frombuffer(data, dtype=np.uint8)
        sources.append(HostSource(view.ctypes.data, size, view))
    return fragments, sources


@dataclass(slots=True)
class CopyPlan:
    """Copies that fill slots with chunks; bytes of a chunk that belong to no entry become zero."""

    host: list[Copy] = field(default_factory=list)
    device: list[tuple[Source, int, int, int]] = field(default_factory=list)
    """(source, target address, offset in the source, bytes)."""

    def add(
        self, layout: StreamLayout, sources: Sequence[Source], chunk: int, address: int
    ) -> None:
        """Fill the memory at `address` with chunk number `chunk`."""
        position = 0
        for segment in layout.segments(chunk):
            self._clear(address + position, segment.chunk_offset - position)
            source = sources[layout.sources[segment.entry]]
            target, offset = address + segment.chunk_offset, segment.source_offset
            if isinstance(source, HostSource):
                self.host.append((source.address + offset, target, segment.size_bytes))
            else:
                self.device.append((source, target, offset, segment.size_bytes))
            position = segment.chunk_offset + segment.size_bytes
        self._clear(address + position, layout.chunks[chunk].size_bytes - position)

    def run(self, engine: CopyEngine, begun: Callable[[CopyHandle], None]) -> None:
        """Copy, on the calling thread and those of `engine`, without the GIL; `begun` hears of it.

        Whoever has the handle may help by waiting for it.
        """
        for source, target, offset, size_bytes in self.device:
            source.copy_to(target, offset, size_bytes)
        if self.host:
            handle = engine.submit(self.host)
            begun(handle)
            handle.wait()
        for source in {id(source): source for source, *_ in self.device}.values():
            source.finish()

    def _clear(self, address: int, size_bytes: int) -> None:
        for start in range(0, size_bytes, len(_ZEROS)):
            size = min(len(_ZEROS), size_bytes - start)
            self.host.append((_ZEROS.ctypes.data, address + start, size))


def _check_tensor(fragment: Fragment, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise CaptureError(
            f"{fragment.key}: its tensor of shape {tuple(tensor.shape)} is not contiguous"
        )
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.numel() != fragment.interval.count or name != fragment.dtype:
        raise CaptureError(
            f"{fragment.key}: the fragment is {fragment.interval.count} elements of "
            f"{fragment.dtype}, the tensor {tensor.numel()} of {name}"
        )
