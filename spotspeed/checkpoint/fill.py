"""Fills live tensors from a checkpoint: host memory in place, a device in bounded batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from spotspeed.checkpoint.reader import ReadReport
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, Holding
from spotspeed.state.piece import Piece

BOUNCE_BYTES = 256 * 1024 * 1024
"""Most host memory that tensors of a device are read through at a time."""


class Reader(Protocol):
    """What is needed of a CheckpointReader."""

    def read_into(self, requests: Sequence[tuple[Fragment, memoryview]]) -> ReadReport: ...


def fill(pieces: Iterable[Piece], reader: Reader, *, bounce_bytes: int = BOUNCE_BYTES) -> int:
    """Read every piece, verified, into its tensor; returns the bytes that were read.

    Tensors in host memory are read into directly; those of a device in batches of `bounce_bytes`
    of pinned host memory, complete when this returns. Raises what the reader raises; the tensors
    are then partly filled.
    """
    pieces = list(pieces)
    at_host = [piece for piece in pieces if piece.tensor.device.type == "cpu"]
    on_device = [piece for piece in pieces if piece.tensor.device.type != "cpu"]
    bytes_read = reader.read_into([(piece.fragment, piece.view()) for piece in at_host]).bytes_read
    for batch in batches(on_device, bounce_bytes):
        bytes_read += bounce(batch, reader)
    return bytes_read


def bounce(batch: Sequence[Piece], reader: Reader) -> int:
    """Read one batch into host memory and copy it to where it belongs."""
    is_pinned = torch.cuda.is_available()
    hosts = [
        Piece(Holding(piece.fragment),
              torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype, pin_memory=is_pinned))
        for piece in batch
    ]  # fmt: skip
    report = reader.read_into([(host.fragment, host.view()) for host in hosts])
    for piece, host in zip(batch, hosts, strict=True):
        piece.tensor.copy_(host.tensor)
    return report.bytes_read


def batches(pieces: Iterable[Piece], limit_bytes: int) -> Iterator[list[Piece]]:
    """The pieces in order, cut where needed, in groups of at most `limit_bytes`."""
    group: list[Piece] = []
    room = limit_bytes
    for piece in pieces:
        whole, item_bytes = piece.fragment.interval, piece.fragment.item_bytes
        start = whole.start
        while start < whole.stop:
            if room < item_bytes:
                yield group
                group, room = [], limit_bytes
            stop = min(whole.stop, start + room // item_bytes)
            part = piece.fragment.narrow(Interval(start, stop))
            tensor = piece.tensor.narrow(0, start - whole.start, stop - start)
            group.append(Piece(Holding(part), tensor))
            room -= part.size_bytes
            start = stop
    if group:
        yield group
