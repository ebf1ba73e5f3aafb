"""Frozen objects: weights that nothing trains, stored once and referred to by their content.

    frozen/step-000000001200.e000003.g1/CONTENT.shard     written by the save of that name

An object is a shard of its own. Its name says which save wrote it and what is in it; nobody ever
writes over it. A save whose weights have the same content names the object in its receipts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import msgpack

from spotspeed.core.documents import check_file, check_sha256
from spotspeed.core.layout import Fragment
from spotspeed.core.lineage import Place, place_of
from spotspeed.errors import FormatError

FOLDER = "frozen"
MIN_BYTES = 16 * 1024
"""A rank with fewer frozen bytes keeps them in its shard: an object costs as much by itself."""
GROUP_BYTES = 64 * 1024 * 1024
"""About what one object holds; an edit of one weight writes its object again, and no other."""
MAX_GROUPS = 64
"""About as many objects has a rank with much, so that its receipt stays small."""
_HEX = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """How a receipt refers to one object: what it holds, where, and what its index hashes to.

    `content` is `content_of` what it holds, `coverage` its number as in core/coverage.py.
    """

    content: str
    coverage: str
    path: str
    size_bytes: int
    index_offset: int
    index_bytes: int
    index_sha256: str
    raw_bytes: int

    def __post_init__(self) -> None:
        check_file(self, least=1)
        check_sha256("content", self.content)
        check_coverage(self.coverage)
        if writer_of(self.path) is None or not self.path.endswith(f"/{self.content}.shard"):
            raise FormatError(f"{self.path!r:.300} is not the name of a frozen object")


def check_coverage(value: str) -> None:
    """Raise FormatError unless `value` is a number as of core/coverage.py."""
    if not _HEX.fullmatch(value):
        raise FormatError(f"coverage is {value!r:.80}, expected 32 hexadecimal digits")


def object_path(directory: str, content: str) -> str:
    """The key of the object that the save `directory` writes."""
    return f"{FOLDER}/{directory}/{content}.shard"


def writer_of(path: str) -> str | None:
    """The directory of the save that wrote the object at `path`; None for another key."""
    parts = path.split("/")
    if len(parts) != 3 or parts[0] != FOLDER or place_of(parts[1]) is None:
        return None
    return parts[1]


def content_of(members: Iterable[tuple[Fragment, bytes]]) -> str:
    """SHA-256 (hex) over fragments and the XXH3-128 of each one's bytes, in their order.

    Equal for equal weights cut alike, whatever process holds them and however they are encoded.
    """
    rows = [
        [fragment.key.kind, fragment.key.name, fragment.key.scope, fragment.dtype,
         list(fragment.shape), fragment.interval.start, fragment.interval.stop, digest]
        for fragment, digest in members
    ]  # fmt: skip
    return hashlib.sha256(msgpack.packb(rows)).hexdigest()


def groups(sizes: Sequence[int]) -> list[range]:
    """Neighbouring fragments of these sizes (bytes) that share an object, as ranges of positions.

    No group for a total below MIN_BYTES.
    """
    total = sum(sizes)
    if total < MIN_BYTES:
        return []
    limit = max(GROUP_BYTES, total // MAX_GROUPS)
    found: list[range] = []
    start, size = 0, 0
    for position, size_bytes in enumerate(sizes):
        if size and size + size_bytes > limit:
            found.append(range(start, position))
            start, size = position, 0
        size += size_bytes
    return [*found, range(start, len(sizes))]


def plan_sweep(
    present: Iterable[str], referred: Collection[str], *, newest: Place | None
) -> frozenset[str]:
    """The objects in `present` that no receipt refers to and that no save can refer to any more.

    `newest` is the newest checkpoint sealed by the running epoch. A rank's saves are stored in
    their order, so when it is sealed, the receipts of every earlier save that is not lost are
    there; objects of later saves, and all as long as the epoch has sealed nothing, stay.
    """
    if newest is None:
        return frozenset()
    garbage = set()
    for path in present:
        writer = writer_of(path)
        place = None if writer is None else place_of(writer)
        if place is not None and place < newest and path not in referred:
            garbage.add(path)
    return frozenset(garbage)
