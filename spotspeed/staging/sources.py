"""Where the bytes of a save come from: this process's memory, and that of accelerators."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.errors import CaptureError
from spotspeed.staging.devices import ENGINES, DeviceQueue, Engines

if TYPE_CHECKING:
    import torch


class Source(Protocol):
    """The bytes of one fragment; kept alive by whoever holds the source."""

    address: int
    size_bytes: int

    def read(self, address: int, offset: int, size_bytes: int) -> None:
        """Copy `size_bytes` bytes from `offset` to memory at `address`; they are there then."""


@dataclass(slots=True)
class HostSource:
    """Bytes in this process's memory; `owner` keeps them alive."""

    address: int
    size_bytes: int
    owner: Any

    def read(self, address: int, offset: int, size_bytes: int) -> None:
        ctypes.memmove(address, self.address + offset, size_bytes)


@dataclass(slots=True)
class DeviceSource:
    """Bytes in an accelerator's memory, to be read by its queue."""

    address: int
    size_bytes: int
    tensor: torch.Tensor
    queue: DeviceQueue

    def read(self, address: int, offset: int, size_bytes: int) -> None:
        copies = np.array([[self.address + offset, address, size_bytes]], dtype=np.uint64)
        self.queue.submit(copies, [self.tensor]).wait()


def gather(
    pieces: Sequence[tuple[Fragment, torch.Tensor]],
    blobs: Mapping[TensorKey, bytes],
    *,
    engines: Engines = ENGINES,
    after: Any = None,
) -> tuple[list[Fragment], list[Source]]:
    """Fragments of a save and where each one's bytes are; raises CaptureError for a bad tensor.

    Bytes on a device are those that are there once the event `after` has come to pass, or else
    what is queued on its current stream now.
    """
    fragments: list[Fragment] = []
    sources: list[Source] = []
    queues: dict[torch.device, DeviceQueue | None] = {}
    names: dict[torch.dtype, str] = {}
    for fragment, tensor in pieces:
        count, dtype, device = tensor.numel(), tensor.dtype, tensor.device
        if dtype not in names:
            names[dtype] = str(dtype).removeprefix("torch.")
        interval = fragment.interval
        if (
            count != interval.stop - interval.start
            or names[dtype] != fragment.dtype
            or not tensor.is_contiguous()
        ):
            raise _refusal(fragment, tensor)
        if device not in queues:
            queues[device] = engines.queue(device, after)
        fragments.append(fragment)
        address, size, queue = tensor.data_ptr(), count * tensor.itemsize, queues[device]
        sources.append(HostSource(address, size, tensor) if queue is None
                       else DeviceSource(address, size, tensor, queue))  # fmt: skip
    for key, data in blobs.items():
        size = len(data)
        fragments.append(Fragment(key, "uint8", (size,), Interval(0, size)))
        view = np.frombuffer(data, dtype=np.uint8)
        sources.append(HostSource(view.ctypes.data, size, view))
    return fragments, sources


def _refusal(fragment: Fragment, tensor: torch.Tensor) -> CaptureError:
    if not tensor.is_contiguous():
        return CaptureError(
            f"{fragment.key}: its tensor of shape {tuple(tensor.shape)} is not contiguous"
        )
    name = str(tensor.dtype).removeprefix("torch.")
    return CaptureError(
        f"{fragment.key}: the fragment is {fragment.interval.count} elements of "
        f"{fragment.dtype}, the tensor {tensor.numel()} of {name}"
    )
