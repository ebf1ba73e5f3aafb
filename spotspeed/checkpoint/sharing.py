"""Reads what the ranks of a node all need once for the node: each a part, into common memory.

At ZeRO stage 0 every rank needs the whole state, and frozen weights are whole on every rank up to
stage 2. Ranks of a node that ask for the same take turns, chunk by chunk; what one has read and
verified the others copy. The memory for that is bounded, by windows of chunks:

    rank:    read own chunks of window k -> all are through -> copy window k -> ...

Windows alternate between the halves of one anonymous file, so that nobody begins to read window
k + 2 before everybody has copied window k. Where memory cannot be shared each rank reads for
itself.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from spotspeed.checkpoint.agreement import Exchange, share_all
from spotspeed.checkpoint.fetch import Part, Span
from spotspeed.checkpoint.processes import this_process
from spotspeed.core.layout import Fragment
from spotspeed.errors import SpotSpeedError
from spotspeed.state.piece import Piece

WINDOW_BYTES = 128 * 1024 * 1024
"""What is read at a time; twice so much memory is taken on each node."""
LEAST_BYTES = 256 * 1024
"""Less is read by each rank for itself: to take turns would take as long."""

Offer = Mapping[str, Any]
"""What a rank says of itself, in plain data."""


class Reader(Protocol):
    """What is needed of a CheckpointReader."""

    def plan(self, fragments: Sequence[Fragment]) -> tuple[int, list[Span]]: ...

    def read_spans(self, spans: Sequence[Span], targets: Sequence[memoryview]) -> int: ...


@dataclass(slots=True)
class Shared:
    """What came of it on this rank."""

    bytes_read: int = 0
    rest: list[Piece] = field(default_factory=list)
    """What this rank has still to read for itself."""
    error: SpotSpeedError | None = None
    """Why this rank has not read its part, if so."""
    is_whole: bool = False
    """Whether every rank has, and this one has copied what it shares."""


def fill_shared(
    pieces: Sequence[Piece], reader: Reader | None, exchange: Exchange, rank: int,
    *, window_bytes: int = WINDOW_BYTES, least_bytes: int = LEAST_BYTES,
) -> Shared:  # fmt: skip
    """Fill what ranks of this node have in common; collective: every rank of the job calls it.

    A rank that cannot read gives no `reader`: then nobody reads anything. Nor does anybody go on
    after an error of one rank, which is in its `error`; every rank returns.
    """
    own = _Common.of(pieces, reader, window_bytes, least_bytes)
    offers = share_all(exchange, "restore-shared", own.offer())
    if not all(offer["can_read"] for offer in offers):
        return Shared(error=own.error)
    if not any(offer["windows"] for offer in offers):
        return Shared(rest=list(pieces), is_whole=True)
    has_memory = own.join(_neighbours(offers, rank), offers)
    answers = share_all(exchange, "restore-memory", has_memory)
    sharing = [offer["windows"] if all(answers[one] for one in _neighbours(offers, member)) else 0
               for member, offer in enumerate(offers)]  # fmt: skip
    del own.windows[sharing[rank] :]
    result = Shared(rest=own.rest(pieces))
    neighbours = _neighbours(offers, rank)
    for number in range(max(sharing)):
        if number < len(own.windows):
            place = neighbours.index(rank), len(neighbours)
            result.error = own.read(number, place, result)
        if any(share_all(exchange, "restore-window", result.error is not None)):
            return result
        if number < len(own.windows):
            own.copy(number)
    result.is_whole = True
    return result


def _neighbours(offers: Sequence[Offer], rank: int) -> list[int]:
    """The ranks of this rank's node that have the same to read, itself included."""
    return [
        other for other, offer in enumerate(offers)
        if offer["windows"] and (offer["node"], offer["wanted"]) == (
            offers[rank]["node"], offers[rank]["wanted"]
        )
    ]  # fmt: skip


@dataclass(slots=True)
class _Common:
    """What this rank needs as others do, in windows of chunks, and the memory they go through."""

    reader: Reader | None
    pieces: list[Piece] = field(default_factory=list)
    windows: list[list[Span]] = field(default_factory=list)
    """Reads of whole chunks; their parts say where the bytes go in the end."""
    window_bytes: int = 0
    error: SpotSpeedError | None = None
    _file: int = -1
    _memory: mmap.mmap | None = None

    @classmethod
    def of(
        cls, pieces: Sequence[Piece], reader: Reader | None, window_bytes: int, least_bytes: int
    ) -> _Common:
        common = [
            piece for piece in pieces if piece.holding.replica_count > 1 and piece.tensor.numel()
        ]
        found = cls(reader, window_bytes=window_bytes)
        if reader is None or sum(one.fragment.size_bytes for one in common) < least_bytes:
            return found
        try:
            _, spans = reader.plan([piece.fragment for piece in common])
        except SpotSpeedError as error:
            found.reader, found.error = None, error
            return found
        windows = _windows(spans, window_bytes)
        if all(_raw_bytes(window) <= window_bytes for window in windows) and found._make_memory():
            found.pieces, found.windows = common, windows
        return found

    def offer(self) -> Offer:
        """For the other ranks, to find whom it can share with."""
        wanted = repr([(str(one.fragment.key), one.fragment.interval) for one in self.pieces])
        identity = this_process()
        return {
            "can_read": self.reader is not None, "windows": len(self.windows),
            "node": f"{identity.boot_id} {identity.namespace}",
            "wanted": hashlib.sha256(wanted.encode()).hexdigest(),
            "pid": identity.pid, "file": self._file,
        }  # fmt: skip

    def join(self, neighbours: Sequence[int], offers: Sequence[Offer]) -> bool:
        """Map the memory of the first neighbour; False where there is none or it cannot be had."""
        if len(neighbours) < 2:
            return False
        first = offers[neighbours[0]]
        if (first["pid"], first["file"]) == (os.getpid(), self._file):
            return True
        try:
            file = os.open(f"/proc/{first['pid']}/fd/{first['file']}", os.O_RDWR | os.O_CLOEXEC)
            try:
                self._memory = mmap.mmap(file, 2 * self.window_bytes)
            finally:
                os.close(file)
        except (OSError, ValueError):
            return False
        return True

    def rest(self, pieces: Sequence[Piece]) -> list[Piece]:
        """What is not in the windows."""
        common = {id(piece) for piece in self.pieces} if self.windows else set()
        return [piece for piece in pieces if id(piece) not in common]

    def read(self, number: int, place: tuple[int, int], result: Shared) -> SpotSpeedError | None:
        """Read this rank's chunks of a window into the memory; returns what went wrong."""
        assert self.reader is not None, "nobody reads unless everybody can"
        begin, step = place
        placed = _placed(self.windows[number])
        try:
            result.bytes_read += self.reader.read_spans(placed[begin::step], [self._half(number)])
        except SpotSpeedError as error:
            return error
        return None

    def copy(self, number: int) -> None:
        """Copy a window, which all have read, to where it belongs."""
        source = torch.frombuffer(self._half(number), dtype=torch.uint8)
        targets = [piece.tensor.view(torch.uint8) for piece in self.pieces]
        for wanted, there in zip(self.windows[number], _placed(self.windows[number]), strict=True):
            for chunk, stored in zip(wanted.chunks, there.chunks, strict=True):
                offset = stored.parts[0].target_offset
                for part in chunk.parts:
                    target = targets[part.request].narrow(
                        0, part.target_offset, part.stop - part.start
                    )
                    target.copy_(source[offset + part.start : offset + part.stop])

    def _half(self, number: int) -> memoryview:
        assert self._memory is not None, "windows are only kept where there is memory"
        return memoryview(self._memory)[number % 2 * self.window_bytes :][: self.window_bytes]

    def _make_memory(self) -> bool:
        try:
            self._file = os.memfd_create("spotspeed-restore", os.MFD_CLOEXEC)
            os.ftruncate(self._file, 2 * self.window_bytes)
            self._memory = mmap.mmap(self._file, 2 * self.window_bytes)
        except OSError:
            return False
        return True

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


def _windows(spans: Sequence[Span], window_bytes: int) -> list[list[Span]]:
    """The reads in their order, in groups of at most so many decoded bytes."""
    windows: list[list[Span]] = []
    room = 0
    for span in spans:
        size = _raw_bytes([span])
        if not windows or size > room:
            windows.append([])
            room = window_bytes
        windows[-1].append(span)
        room -= size
    return windows


def _raw_bytes(spans: Sequence[Span]) -> int:
    return sum(chunk.record.raw_size for span in spans for chunk in span.chunks)


def _placed(window: Sequence[Span]) -> list[Span]:
    """The same reads, whose chunks go whole into the window, one after the other."""
    offset, placed = 0, []
    for span in window:
        chunks = []
        for chunk in span.chunks:
            size = chunk.record.raw_size
            chunks.append(replace(chunk, parts=(Part(0, size, 0, offset),)))
            offset += size
        placed.append(replace(span, chunks=tuple(chunks)))
    return placed
