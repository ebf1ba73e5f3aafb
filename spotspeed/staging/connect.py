"""Reaching the saver of a node: connect, check who it is, greet, map the arena it lends."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable

from spotspeed.core.saver_protocol import (
    PREAMBLE_BYTES,
    PROTOCOL_VERSION,
    Decoder,
    Hello,
    Refused,
    Welcome,
    decode_preamble,
    encode,
    encode_preamble,
)
from spotspeed.errors import FormatError, PoolExhaustedError, SpotSpeedError, StorageError
from spotspeed.staging.native import Arena, DeviceError

HANDSHAKE_TIMEOUT_S = 30.0
RECV_BYTES = 1 << 16
PREFAULT_NICE = 19
PREFAULT_BYTES = 64 * 1024 * 1024
_UCRED = struct.Struct("3i")
_logger = logging.getLogger("spotspeed")


class Connection:
    """A socket on which both sides have greeted each other, and what came with the greeting."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.socket = sock
        self.name = name
        self.decoder = Decoder()
        self.arena_fd = -1
        self.welcome = Welcome(0, 0, 0)


class Leaving(StorageError):
    """The saver takes no more sessions; it leaves when its work is done."""


def connect(name: str) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(HANDSHAKE_TIMEOUT_S)
    try:
        sock.connect("\0" + name)
    except ConnectionRefusedError:
        sock.close()
        return None
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid != os.getuid():
        sock.close()
        raise StorageError(
            f"socket @{name} belongs to user {uid}, not to user {os.getuid()}: somebody else took "
            f"the saver's name on this machine"
        )
    return sock


def greet(sock: socket.socket, name: str, hello: Hello) -> Connection:
    """Exchange preambles and open the session; OSError when the saver hangs up."""
    connection = Connection(sock, name)
    sock.sendall(encode_preamble(os.getpid()))
    data = b""
    while len(data) < PREAMBLE_BYTES:
        received = sock.recv(PREAMBLE_BYTES - len(data))
        if not received:
            raise ConnectionResetError("closed during the greeting")
        data += received
    version, pid = decode_preamble(data)
    if version != PROTOCOL_VERSION:
        raise Leaving(
            f"saver process {pid} speaks protocol {version}, this rank {PROTOCOL_VERSION}, and it "
            f"still has work; it leaves when that is done"
        )
    sock.sendall(encode(hello))
    while True:
        data, descriptors, _, _ = socket.recv_fds(sock, RECV_BYTES, 1)
        if not data:
            raise ConnectionResetError("closed during the greeting")
        connection.arena_fd = descriptors[0] if descriptors else connection.arena_fd
        for message in connection.decoder.feed(data):
            if isinstance(message, Welcome):
                connection.welcome = message
                sock.settimeout(None)
                return connection
            if isinstance(message, Refused):
                raise _refusal(message, sock)
            raise FormatError(f"saver socket: greeted with {type(message).__name__}")


def _refusal(message: Refused, sock: socket.socket) -> SpotSpeedError:
    if message.cause == "leaving":
        return Leaving(message.reason)
    sock.close()
    kind = PoolExhaustedError if message.cause == "memory" else StorageError
    return kind(message.reason)


def await_end(sock: socket.socket, deadline: float) -> None:
    """Wait until the saver closes the connection by leaving."""
    with sock, contextlib.suppress(OSError):
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        while sock.recv(RECV_BYTES):
            pass


class LentArena:
    """The saver's arena as this process has mapped it; `address` is 0 when there is none."""

    def __init__(self, connection: Connection) -> None:
        self._arena: Arena | None = None
        self._registered: object = None
        self._is_tried = False
        self.address = 0
        size, descriptor = connection.welcome.arena_bytes, connection.arena_fd
        if size == 0:
            return
        if descriptor < 0:
            raise FormatError("saver socket: an arena was announced and no descriptor came")
        try:
            self._arena = Arena.attach(descriptor)
        finally:
            os.close(descriptor)
        if self._arena.size_bytes != size:
            raise FormatError(f"saver socket: an arena of {self._arena.size_bytes} bytes came, "
                              f"{size} were announced")  # fmt: skip
        self.address = self._arena.address
        threading.Thread(
            target=_prefault, args=(self._arena,), name="spotspeed-prefault", daemon=True
        ).start()

    def pin(self, lock: Callable[[int, int], object]) -> None:
        """Page-lock the memory, so that copies from a GPU run asynchronously at full speed.

        `lock(address, size_bytes)` does it for as long as what it returns lives. It is called
        once: a system that refuses does so again, and copies run without it.
        """
        if self._arena is None or self._is_tried:
            return
        self._is_tried = True
        try:
            self._registered = lock(self.address, self._arena.size_bytes)
        except DeviceError as error:
            _logger.warning(
                "%d bytes of staging memory cannot be page-locked: %s; copies out of the GPU are "
                "slower", self._arena.size_bytes, error,
            )  # fmt: skip

    def __del__(self) -> None:
        # Unlocking needs the mapping, so it comes first.
        self._registered = None
        self._arena = None


def _prefault(arena: Arena) -> None:
    """Map the pages in slices at low priority, so that the first save does not pay for it."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), PREFAULT_NICE)
        for start in range(0, arena.size_bytes, PREFAULT_BYTES):
            arena.prefault(start, min(PREFAULT_BYTES, arena.size_bytes - start))
