"""The fixed parts of a shard file: header, placement of frames, footer (docs/FORMAT.md)."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from spotspeed.core.documents import FORMAT_MAJOR, MAX_WORLD_SIZE, SHARD_MINOR
from spotspeed.errors import ChecksumMismatchError, FormatError

SHARD_MAGIC = b"\x93SPOTSHD"
END_MAGIC = b"SPOTEND\x93"
HEADER_BYTES = 4096
FRAME_ALIGNMENT = 4096
FOOTER_BYTES = 64
DIGEST_BYTES = 16
"""XXH3-128, in the big-endian (canonical) byte order."""

CODEC_RAW = 0
CODEC_ZSTD = 1
CODEC_PLANES = 2
CODECS = (CODEC_RAW, CODEC_ZSTD, CODEC_PLANES)

_HEADER = struct.Struct("<8sHHI32sII")
_FOOTER = struct.Struct("<QQ32sHHI8s")


@dataclass(frozen=True, slots=True)
class Header:
    """What the first page of a shard says: whose it is and which format it has."""

    ticket_digest: bytes
    rank: int
    world_size: int
    minor: int = SHARD_MINOR


@dataclass(frozen=True, slots=True)
class Footer:
    """Where the index lies (bytes from the start of the file) and what it hashes to (SHA-256)."""

    index_offset: int
    index_bytes: int
    index_sha256: bytes
    minor: int = SHARD_MINOR

    @property
    def file_bytes(self) -> int:
        """Size of the whole file: the footer follows the index and ends the file."""
        return self.index_offset + self.index_bytes + FOOTER_BYTES


def align_frame(offset: int) -> int:
    """Where the next frame, or the index, begins when the bytes so far end at `offset`."""
    return -(-offset // FRAME_ALIGNMENT) * FRAME_ALIGNMENT


def encode_header(header: Header) -> bytes:
    """The first HEADER_BYTES of a shard; a pure function of `header`."""
    fields = _HEADER.pack(
        SHARD_MAGIC, FORMAT_MAJOR, header.minor, 0,
        header.ticket_digest, header.rank, header.world_size,
    )  # fmt: skip
    return (fields + hashlib.sha256(fields).digest()).ljust(HEADER_BYTES, b"\0")


def parse_header(data: bytes, *, source: str) -> Header:
    """The header of shard `source`; raises FormatError or ChecksumMismatchError naming it."""
    if len(data) != HEADER_BYTES:
        raise FormatError(f"{source}: a header has {HEADER_BYTES} bytes, found {len(data)}")
    magic, major, minor, flags, digest, rank, world_size = _HEADER.unpack_from(data)
    if magic != SHARD_MAGIC:
        raise FormatError(f"{source}: not a shard: it begins with {magic.hex()}")
    _check_digest(data[: _HEADER.size], data[_HEADER.size :][:32], f"{source}#header")
    check_major(major, minor, source)
    if flags:
        raise FormatError(f"{source}: flags {flags:#x} are not known to this version")
    if any(data[_HEADER.size + 32 :]):
        raise FormatError(f"{source}: reserved bytes of the header are not zero")
    if not rank < world_size <= MAX_WORLD_SIZE:
        raise FormatError(f"{source}: rank {rank} of {world_size}")
    return Header(digest, rank, world_size, minor)


def encode_footer(footer: Footer) -> bytes:
    """The last FOOTER_BYTES of a shard; a pure function of `footer`."""
    return _FOOTER.pack(
        footer.index_offset, footer.index_bytes, footer.index_sha256,
        FORMAT_MAJOR, footer.minor, 0, END_MAGIC,
    )  # fmt: skip


def parse_footer(data: bytes, *, source: str) -> Footer:
    """The footer of shard `source`; raises FormatError naming it.

    The caller compares `Footer.file_bytes` with the size of the file.
    """
    if len(data) != FOOTER_BYTES:
        raise FormatError(f"{source}: a footer has {FOOTER_BYTES} bytes, found {len(data)}")
    offset, size, digest, major, minor, reserved, magic = _FOOTER.unpack(data)
    if magic != END_MAGIC:
        raise FormatError(f"{source}: does not end as a shard does; truncated or appended to")
    check_major(major, minor, source)
    if reserved:
        raise FormatError(f"{source}: reserved bytes of the footer are not zero")
    if offset < HEADER_BYTES or offset % FRAME_ALIGNMENT or max(offset, size) > 2**62:
        raise FormatError(f"{source}: the index cannot lie at {offset} with {size} bytes")
    return Footer(offset, size, digest, minor)


def check_major(major: object, minor: object, source: str) -> None:
    """Raise FormatError unless `major` is this version's."""
    if major != FORMAT_MAJOR:
        raise FormatError(
            f"{source}: format {major}.{minor}, this version reads {FORMAT_MAJOR}.x: install a "
            f"spotspeed that knows it"
        )


def _check_digest(data: bytes, expected: bytes, key: str) -> None:
    actual = hashlib.sha256(data).digest()
    if actual != expected:
        raise ChecksumMismatchError(key=key, expected=expected.hex(), actual=actual.hex())
