"""Chunk to frame and back: digests, byte planes, zstd."""

from spotspeed.codec.digest import Buffer, check_digest, digest, hasher
from spotspeed.codec.frames import Frame, decode, encode
from spotspeed.codec.policy import RAW, CodecPolicy

__all__ = [
    "RAW", "Buffer", "CodecPolicy", "Frame", "check_digest", "decode", "digest", "encode",
    "hasher",
]  # fmt: skip
