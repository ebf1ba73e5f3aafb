"""Gives every rank of a machine the others' parts of the low-precision weights, through memory.

A collective over sockets copies each byte several times, and is most of what a restore takes. Ranks
of one machine write their part to an anonymous file each, one window at a time, and read those of
the others:

    write window k of the own part -> all have -> read it of the others -> write window k + 1 -> ...

Windows alternate between the halves of a file, so that window k + 2 is only written when everybody
has read window k. The files are gone with the processes, however these end.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed import comm

WINDOW_BYTES = 8 * 1024 * 1024
"""What is written at a time; few enough bytes to stay in a cache until they are read."""
LEAST_BYTES = 1024 * 1024
"""Less goes through the collective, which takes no longer then."""

Run = tuple[int, int, int]
"""Bytes [start, stop) of the partitions of one group of parameters."""


def spread(
    partitions: Sequence[Sequence[torch.Tensor]], groups: Sequence[Any],
    *, window_bytes: int = WINDOW_BYTES, least_bytes: int = LEAST_BYTES,
) -> bool:  # fmt: skip
    """Fill the other ranks' partitions of each group of parameters; collective.

    `partitions[g][r]` is rank r's, and `groups[g]` who has one. Returns False on all ranks alike
    where they do not share memory, or one of them has none left: what this rank holds of the
    others is undefined then, and a collective has to bring it.
    """
    own_bytes = sum(_size(parts[0]) for parts in partitions)
    is_one_group = all(group is groups[0] for group in groups)
    if own_bytes < least_bytes or not is_one_group or comm.get_world_size(groups[0]) == 1:
        return False
    if any(part.device.type != "cpu" for parts in partitions for part in parts):
        return False
    rank = comm.get_rank(groups[0])
    with contextlib.ExitStack() as stack:
        files = _open_files(groups[0], rank, stack)
        if files is None:
            return False
        views = [[_bytes_of(part) for part in parts] for parts in partitions]
        sizes = [len(parts[0]) for parts in views]
        for number, window in enumerate(_windows(sizes, window_bytes)):
            begin = number % 2 * window_bytes
            is_written = _write(files[rank], begin, [views[g][rank][a:b] for g, a, b in window])
            if not _all(groups[0], is_written):
                return False
            for other, file in enumerate(files):
                if other != rank:
                    _read(file, begin, [views[g][other][a:b] for g, a, b in window])
    return True


def _open_files(group: Any, rank: int, stack: contextlib.ExitStack) -> list[int] | None:
    """Every rank's file, in the order of the group; None on all ranks when one lacks one."""
    name, own = f"spotspeed-weights-{secrets.token_hex(8)}", -1
    with contextlib.suppress(OSError):
        own = os.memfd_create(name, os.MFD_CLOEXEC)
        stack.callback(os.close, own)
    offers: list[Any] = [None] * comm.get_world_size(group)
    comm.all_gather_object(offers, (os.getpid(), own, name), group=group)
    files = []
    for member, (pid, descriptor, wanted) in enumerate(offers):
        file = own if member == rank else _open_of(pid, descriptor, wanted)
        files.append(file)
        if member != rank and file >= 0:
            stack.callback(os.close, file)
    return files if _all(group, min(files) >= 0) else None


def _open_of(pid: int, descriptor: int, name: str) -> int:
    """A process's file of that name; -1 where it is of another machine, or may not be opened."""
    link = f"/proc/{pid}/fd/{descriptor}"
    try:
        if not os.readlink(link).startswith(f"/memfd:{name}"):
            return -1
        return os.open(link, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _windows(sizes: Sequence[int], window_bytes: int) -> Iterator[list[Run]]:
    """All bytes of partitions of these sizes, in groups of at most `window_bytes`."""
    window: list[Run] = []
    room = window_bytes
    for group, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            window.append((group, start, stop))
            room, start = room - (stop - start), stop
            if not room:
                yield window
                window, room = [], window_bytes
    if window:
        yield window


def _write(file: int, offset: int, views: Sequence[memoryview]) -> bool:
    """Write views one after the other; False when there is no memory for them."""
    try:
        for view in views:
            done = 0
            while done < len(view):
                done += os.pwrite(file, view[done:], offset + done)
            offset += len(view)
    except OSError:
        return False
    return True


def _read(file: int, offset: int, views: Sequence[memoryview]) -> None:
    for view in views:
        done = 0
        while done < len(view):
            count = os.preadv(file, [view[done:]], offset + done)
            assert count > 0, "every rank has written its window"
            done += count
        offset += len(view)


def _all(group: Any, claim: bool) -> bool:
    """Whether all ranks claim it; nobody goes on before all have come here."""
    claims = torch.tensor([int(claim)], dtype=torch.int32)
    comm.all_reduce(claims, op=comm.ReduceOp.MIN, group=group)
    return bool(claims.item())


def _size(part: torch.Tensor) -> int:
    return part.numel() * part.element_size()


def _bytes_of(part: torch.Tensor) -> memoryview:
    view: memoryview = part.detach().view(torch.uint8).numpy().data
    return view
