"""Copies out of accelerators: by the native engine where it was built with CUDA, else by torch."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from spotspeed.staging.native import (
    DeviceCopyEngine,
    DeviceHandle,
    RegisteredMemory,
    cuda_available,
)

if TYPE_CHECKING:
    import torch

Copies = npt.NDArray[np.uint64]
"""One row a copy: source address, target address, bytes."""
STREAMS = 3
"""Copy streams of a device: two that keep both ways of a copy engine busy, and one that packs."""


class Pending(Protocol):
    """Copies that have been begun."""

    def wait(self) -> Any:
        """Return when all bytes have arrived; raises what went wrong. Without the GIL."""


class DeviceQueue(Protocol):
    """Copies out of one device, each after what the step that is saved had queued there."""

    def submit(self, copies: Copies, tensors: Sequence[torch.Tensor]) -> Pending:
        """Begin to copy; row i reads bytes of `tensors[i]`, which stay alive until it is over."""


class Submits(Protocol):
    """What DeviceCopyEngine and its plain twin have in common."""

    def submit(self, copies: Copies, *, after_event: int = 0, keep: object = None) -> DeviceHandle:
        """Begin to copy what the event's stream had been given when the event was recorded."""


class Engines(Protocol):
    """The ways to copy out of the devices of this process."""

    def queue(self, device: torch.device, after: Any) -> DeviceQueue | None:
        """A queue behind the event `after`, or None for memory of the host.

        `after` is a torch.cuda.Event, None for all that is queued on the current stream now.
        """

    def lock(self, device: torch.device, address: int, size_bytes: int) -> object:
        """Page-lock host memory for copies out of `device`, as long as the answer lives.

        Raises DeviceError when the system refuses.
        """


class NativeQueue:
    """Copies by an engine of csrc/device.h: several streams, small tensors packed by a kernel."""

    def __init__(self, engine: Submits, after: Any = None) -> None:
        self._engine, self._after = engine, after

    def submit(self, copies: Copies, tensors: Sequence[torch.Tensor]) -> Pending:
        event = 0 if self._after is None else int(self._after.cuda_event)
        return self._engine.submit(copies, after_event=event, keep=(self._after, tensors))


class TorchQueue:
    """Copies by torch: on CUDA on a stream of their own, elsewhere on the default stream.

    For builds without CUDA, and for devices that are not CUDA's.
    """

    def __init__(self, device: torch.device, after: Any) -> None:
        import torch

        self._stream: Any = None
        if device.type == "cuda":
            cuda: Any = torch.cuda
            self._stream = cuda.Stream(device)
            self._stream.wait_event(after)

    def submit(self, copies: Copies, tensors: Sequence[torch.Tensor]) -> Pending:
        import torch

        for (source, target, size), tensor in zip(copies.tolist(), tensors, strict=True):
            whole = tensor.detach().view(torch.uint8)
            start = source - tensor.data_ptr()
            buffer = (ctypes.c_char * size).from_address(target)
            try:
                part = whole.narrow(0, start, size)
                self._copy(part, torch.frombuffer(buffer, dtype=torch.uint8))
            except BaseException:
                self.wait()  # What was begun may not arrive when nobody expects it.
                raise
        return self

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        import torch

        if self._stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """Return when all copies have arrived."""
        if self._stream is not None:
            self._stream.synchronize()


class DeviceEngines:
    """The engines of this process's devices, each made when it is first needed."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._native: dict[int, DeviceCopyEngine] = {}

    def queue(self, device: torch.device, after: Any) -> DeviceQueue | None:
        import torch

        if device.type == "cpu":
            return None
        if device.type == "cuda" and after is None:
            cuda: Any = torch.cuda
            after = cuda.current_stream(device).record_event()
        if device.type != "cuda" or not cuda_available():
            return TorchQueue(device, after)
        index = _index(device)
        with self._mutex:
            if index not in self._native:
                self._native[index] = DeviceCopyEngine(index, streams=STREAMS)
            return NativeQueue(self._native[index], after)

    def lock(self, device: torch.device, address: int, size_bytes: int) -> object:
        if device.type != "cuda" or not cuda_available():
            return None
        return RegisteredMemory(address, size_bytes, device=_index(device))


def _index(device: torch.device) -> int:
    import torch

    return torch.cuda.current_device() if device.index is None else device.index


ENGINES = DeviceEngines()
"""Those of this process."""
