"""What a device had been given to do at a boundary, apart from what the training queued later."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def behind(event: Any) -> Iterator[None]:
    """Run this thread's work on a GPU behind `event`, beside the training's forward and backward.

    On the default stream it would queue behind both, and a training on another stream would not
    be awaited at all. What is begun inside has ended on return. Without a CUDA event nothing
    happens: other devices have one queue.
    """
    if not isinstance(event, torch.cuda.Event):
        yield
        return
    stream = _stream(event.device)
    with torch.cuda.device(event.device), torch.cuda.stream(stream):
        stream.wait_event(event)
        yield
        stream.synchronize()


@functools.cache
def _stream(device: torch.device) -> Any:
    """One stream a device: scratch memory that a stream has used is kept for it alone."""
    cuda: Any = torch.cuda
    return cuda.Stream(device)
