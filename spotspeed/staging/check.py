"""The mutation sanitizer: digests of what is being staged, before and after its window."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash

from spotspeed.core.layout import Fragment
from spotspeed.errors import CaptureError
from spotspeed.staging.sources import Source

Mode = Literal["off", "sampled", "full"]
SAMPLES_MAX = 64
SAMPLE_BYTES = 16 * 1024
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Sample:
    fragment: Fragment
    source: Source
    offset: int
    size_bytes: int
    digest: int


class Window:
    """Digests of samples of a save's sources, taken when it is made and again by `verify`.

    "sampled" digests 16 KiB at pseudo-random places of at most 64 fragments, "full" everything.
    """

    def __init__(
        self, fragments: Sequence[Fragment], sources: Sequence[Source], mode: Mode, *, seed: int
    ) -> None:
        chooser = random.Random(seed)
        numbers = [number for number, source in enumerate(sources) if source.size_bytes]
        if mode == "off":
            numbers = []
        elif mode == "sampled" and len(numbers) > SAMPLES_MAX:
            numbers = sorted(chooser.sample(numbers, SAMPLES_MAX))
        self._samples: list[_Sample] = []
        for number in numbers:
            source = sources[number]
            size = source.size_bytes if mode == "full" else min(source.size_bytes, SAMPLE_BYTES)
            offset = chooser.randint(0, source.size_bytes - size)
            digest = _digest(source, offset, size)
            self._samples.append(_Sample(fragments[number], source, offset, size, digest))

    def join(self, other: Window) -> None:
        """Watch what `other` watches as well."""
        self._samples += other._samples

    def verify(self) -> None:
        """Raise CaptureError naming the fragments that were changed inside the window."""
        changed = [
            str(sample.fragment.key) for sample in self._samples
            if _digest(sample.source, sample.offset, sample.size_bytes) != sample.digest
        ]  # fmt: skip
        if changed:
            raise CaptureError(
                f"{len(changed)} of {len(self._samples)} sampled fragments were changed while "
                f"they were being staged, so this save is not one step's state: "
                f"{', '.join(changed[:8])}; something writes to them outside the optimizer's "
                f"update (staging.lazy: false copies before the step returns)"
            )


def _digest(source: Source, offset: int, size_bytes: int) -> int:
    hasher = xxhash.xxh3_64()
    for start in range(offset, offset + size_bytes, _PIECE_BYTES):
        piece = np.empty(min(_PIECE_BYTES, offset + size_bytes - start), dtype=np.uint8)
        source.read(piece.ctypes.data, start, len(piece))
        hasher.update(piece.data)
    return hasher.intdigest()
