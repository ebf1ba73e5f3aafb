"""The digest that guards every chunk: XXH3-128."""

from __future__ import annotations

import xxhash

from spotspeed.errors import ChecksumMismatchError

Buffer = bytes | bytearray | memoryview


def digest(buffer: Buffer) -> bytes:
    """XXH3-128 of `buffer` (contiguous), 16 bytes in canonical (big-endian) order.

    Finds damage, not forgery; the SHA-256 tree above it is what makes the digests themselves
    trustworthy (docs/FORMAT.md, "Digest tree"). Releases the GIL for large buffers.
    """
    return xxhash.xxh3_128_digest(buffer)


def hasher() -> xxhash.xxh3_128:
    """The same digest over buffers that come one after the other: `update`, then `digest`."""
    return xxhash.xxh3_128()


def check_digest(buffer: Buffer, expected: bytes, *, key: str) -> None:
    """Raise ChecksumMismatchError naming `key` unless `buffer` has digest `expected`."""
    actual = digest(buffer)
    if actual != expected:
        raise ChecksumMismatchError(key=key, expected=expected.hex(), actual=actual.hex())
