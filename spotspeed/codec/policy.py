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
    def choose(compression: Literal["zstd", "none"] | None, *, is_local: bool) -> CodecPolicy:
        """The policy for the config's `compression` and a store that is a local disk or not.

        A local disk takes bytes faster than one core compresses them (null is raw there); a remote
        store does not, and bills the bytes (null samples).
        """
        if compression == "zstd":
            return CodecPolicy("zstd", min_gain=0.01)
        if compression is None and not is_local:
            return CodecPolicy("sampled", min_gain=0.08)
        return CodecPolicy("raw")


RAW = CodecPolicy("raw")
