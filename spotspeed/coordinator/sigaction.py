"""Reads which native function a signal is delivered to, which Python itself cannot tell."""

from __future__ import annotations

import ctypes

_STRUCT_SIGACTION_BYTES = 512
"""More than glibc's and musl's; on both the handler is the first member (signal-safety, POSIX)."""


def native_handler(signum: int) -> int | None:
    """Address of the installed handler; None where the C library does not tell."""
    try:
        sigaction = ctypes.CDLL(None).sigaction
    except (AttributeError, OSError):
        return None
    current = ctypes.create_string_buffer(_STRUCT_SIGACTION_BYTES)
    if sigaction(signum, None, current) != 0:
        return None
    return int.from_bytes(current.raw[: ctypes.sizeof(ctypes.c_void_p)], "little")
