"""The shared arena, as Python sees it: a sealed buffer that other processes can map."""

from __future__ import annotations

import array
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spotspeed.staging.native import Arena, buffer_range

PAGE = os.sysconf("SC_PAGESIZE")
CHILD = """
import array, os, signal, socket, sys
from spotspeed.staging.native import Arena
channel = socket.socket(fileno=int(sys.argv[1]))
_, ancillary, _, _ = channel.recvmsg(1, socket.CMSG_SPACE(4))
descriptors = array.array("i")
descriptors.frombytes(ancillary[0][2][:4])
arena = Arena.attach(descriptors[0])
os.close(descriptors[0])
memoryview(arena)[100:105] = b"alive"
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_huge_pages_are_counted_where_they_were_given() -> None:
    arena = Arena.create(8 << 20)
    assert arena.huge_page_bytes() == 0, "nothing has been touched"
    arena.prefault(0, len(arena))
    given = arena.huge_page_bytes()
    assert 0 <= given <= len(arena)
    assert given % (2 << 20) == 0
    pattern = rf"^{arena.address:x}-.*?^(?:Shmem|File)PmdMapped: +(\d+) kB"
    smaps = Path("/proc/self/smaps").read_text()
    mapped = re.search(pattern, smaps, re.MULTILINE | re.DOTALL)
    assert mapped is not None
    assert given == int(mapped[1]) * 1024


def test_an_arena_is_a_writable_buffer_of_whole_pages() -> None:
    arena = Arena.create(PAGE + 1)
    assert arena.size_bytes == len(arena) == 2 * PAGE
    assert arena.address % PAGE == 0
    view = memoryview(arena)
    assert (view.nbytes, view.readonly, view.format) == (2 * PAGE, False, "B")
    assert buffer_range(arena, writable=True).address == arena.address
    assert not any(view)


def test_a_view_keeps_the_mapping() -> None:
    view = np.frombuffer(Arena.create(PAGE), dtype=np.uint8)
    view[:] = 7
    assert int(view.sum()) == 7 * PAGE


def test_what_a_killed_process_wrote_stays() -> None:
    arena = Arena.create(PAGE)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        rights = array.array("i", [arena.fd])
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert child.wait(60) == -signal.SIGKILL
    assert bytes(memoryview(arena)[100:105]) == b"alive"


def test_an_attached_arena_needs_no_descriptor() -> None:
    arena = Arena.create(PAGE)
    descriptor = os.dup(arena.fd)
    other = Arena.attach(descriptor)
    os.close(descriptor)
    memoryview(arena)[:3] = b"abc"
    assert bytes(memoryview(other)[:3]) == b"abc"
    assert other.fd == -1 and not os.get_inheritable(arena.fd)


def test_a_forked_child_has_no_part_of_an_attached_arena() -> None:
    """An orphaned worker would keep the memory; and what it drops is not its to unmap."""
    created = Arena.create(PAGE, name="spotspeed-forked")
    arena = Arena.attach(created.fd)
    del created
    assert "spotspeed-forked" in Path("/proc/self/maps").read_text()
    child = os.fork()
    if child == 0:
        del arena
        os._exit("spotspeed-forked" in Path("/proc/self/maps").read_text())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    memoryview(arena)[:3] = b"abc"


def test_nobody_can_take_pages_away() -> None:
    arena = Arena.create(2 * PAGE)
    for size in (PAGE, 3 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)


def test_descriptors_without_seals_are_refused() -> None:
    descriptor = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, PAGE)
        with pytest.raises(ValueError, match="not an arena"):
            Arena.attach(descriptor)
    finally:
        os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Arena.attach(-1)


def test_sizes_that_no_arena_has_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        Arena.create(0)
    with pytest.raises(ValueError, match="too large"):
        Arena.create(2**63)
    with pytest.raises(TypeError):
        Arena.create(-1)


def test_prefault_keeps_content_and_checks_its_range() -> None:
    arena = Arena.create(4 * PAGE)
    memoryview(arena)[:] = bytes(range(256)) * (4 * PAGE // 256)
    arena.prefault(0, 4 * PAGE)
    arena.prefault(PAGE + 5, 3)
    assert bytes(arena) == bytes(range(256)) * (4 * PAGE // 256)
    for offset, size in [(0, 4 * PAGE + 1), (4 * PAGE + 1, 0), (PAGE, 2**63)]:
        with pytest.raises(ValueError, match="not inside"):
            arena.prefault(offset, size)


def test_closing_returns_descriptor_and_memory() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        Arena.create(PAGE)
    assert len(os.listdir("/proc/self/fd")) == before
