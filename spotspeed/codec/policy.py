"""How hard to try to make a chunk smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class CodecPolicy:
    """Whether chunks are compressed, and for what gain.

    `mode` "raw" never compresses; "zstd" compresses whatever gets smaller by `min_gain`, a
    fraction of the chunk; "sampled" looks at a few slices of a chunk first and leaves it raw, at
    the cost of the look (about 0.2 ms), unless they promise `min_gain`.
    """

    mode: Literal["raw", "zstd", "sampled"] = "raw"
    min_gain: float = 0.0

    @staticmethod
    def choose(compression: Literal["zstd", "none"] | None, *, is_worth: bool) -> CodecPolicy:
        """The policy for the config's `compression`; with null it is for the store to say.

        `is_worth`: it takes bytes more slowly than they are compressed (core/compression.py). Then
        each chunk is sampled.
        """
        if compression == "zstd":
            return CodecPolicy("zstd", min_gain=0.01)
        if compression is None and is_worth:
            return CodecPolicy("sampled", min_gain=0.08)
        return CodecPolicy("raw")


RAW = CodecPolicy("raw")
