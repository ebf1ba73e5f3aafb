"""Whether compressing pays for a store: decided by what store and encoders were measured to take.

Encoding runs beside writing. A byte of state takes 1/W seconds raw, W being the bytes a second that
the store takes, and max(1/E, r/W) encoded, E being those that the encoders take and r the ratio: so
it pays where W < E, whatever r is below 1. How fast a store is shows when it is waited for alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

ENOUGH_BYTES = 64 * 1024 * 1024
"""Less tells nothing: it fits into what lies between us and the store."""
ENCODE_BYTES_PER_S = 0.5e9
"""About what one core encodes (benchmarks/codec.py), until it has been measured here."""
_MARGIN = 2.0
"""Compressing begins where the encoders are so much faster, and ends where they are slower."""
_FRESH = 0.5
"""Weight of the newest measurement."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One file that was stored: for what its writer waited, and what that came to.

    `chunks_s` is the wait for chunks that were still being staged, `encode_s` for encoders,
    `write_s` for the store. `encoding_s` are the seconds of all encoders together. `writers` files
    were being stored at once, through the same `encoders` to the same store.
    """

    is_encoded: bool
    raw_bytes: int
    stored_bytes: int
    chunks_s: float
    encode_s: float
    write_s: float
    encoding_s: float
    writers: int
    encoders: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Whether chunks are encoded from now on, and what is known of the two speeds."""

    is_encoded: bool
    encoders: int
    store_bytes_s: float | None = None
    encoder_bytes_s: float | None = None
    reason: str = "nothing has been measured yet"

    @property
    def encode_bytes_s(self) -> float:
        """What the encoders take, together."""
        return self.encoder_bytes_s or self.encoders * ENCODE_BYTES_PER_S


def look(choice: Choice, seen: Seen) -> Choice:
    """The choice after one more file.

    While chunks are encoded the store's speed shows only where the writer waits for the store. If
    it waits for the encoders instead, and the store's speed is not known, the next file is not
    encoded: then it shows.
    """
    if seen.raw_bytes < ENOUGH_BYTES:
        return choice
    if seen.is_encoded and seen.encoding_s > 0:
        took = seen.raw_bytes * seen.encoders / seen.encoding_s
        choice = replace(choice, encoder_bytes_s=_mixed(choice.encoder_bytes_s, took))
    if not seen.is_encoded or seen.write_s >= max(seen.encode_s, seen.chunks_s):
        took = seen.writers * seen.stored_bytes / max(seen.write_s, 1e-9)
        return told(choice, _mixed(choice.store_bytes_s, took))
    if seen.encode_s < max(seen.write_s, seen.chunks_s):
        return choice  # The training's copies are what it waits for.
    if choice.store_bytes_s is None:
        return replace(choice, is_encoded=False, reason="encoding is what a file waits for")
    return told(choice, choice.store_bytes_s)


def told(choice: Choice, store_bytes_s: float) -> Choice:
    """The choice for a store that takes so much, measured by whom it may be."""
    limit = choice.encode_bytes_s / (1.0 if choice.is_encoded else _MARGIN)
    is_encoded = store_bytes_s < limit
    reason = (
        f"the store takes {store_bytes_s / 1e6:.0f} MB/s, the encoders "
        f"{choice.encode_bytes_s / 1e6:.0f} MB/s"
    )
    return replace(choice, is_encoded=is_encoded, store_bytes_s=store_bytes_s, reason=reason)


def _mixed(before: float | None, now: float) -> float:
    return now if before is None else _FRESH * now + (1 - _FRESH) * before
