"""What saves have in common is laid out once, and the result is as if it had been anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotspeed.core.chunks import join, pack, pack_parts
from spotspeed.core.coverage import coverage
from spotspeed.core.described import Described, common_count, lay_out
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.errors import FormatError, InvalidLayoutError

CHUNK = 4096


def fragment(kind: str, name: str, count: int) -> Fragment:
    return Fragment(TensorKey(kind, name), "float32", (count,), Interval(0, count))


def some(name: str, kinds: list[str]) -> st.SearchStrategy[list[Fragment]]:
    pairs = st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, 2500)), max_size=6)
    return pairs.map(lambda found: [fragment(kind, f"{name}{number}", count)
                                    for number, (kind, count) in enumerate(found)])  # fmt: skip


@given(
    common=some("a", ["fp32", "exp_avg"]),
    rest=some("b", ["blob"]) | some("b", ["blob", "fp32"]),
    objects=some("c", ["weight"]),
)
def test_the_layout_is_that_of_all_fragments(
    common: list[Fragment], rest: list[Fragment], objects: list[Fragment]
) -> None:
    counts = [1] * len(objects)
    described = Described.of(common, chunk_bytes=CHUNK)
    parts = lay_out(described, [*objects, *rest], counts)
    expected = pack_parts([*objects, *common, *rest], counts, chunk_bytes=CHUNK)
    assert parts == expected
    assert join(parts, counts) == join(expected, counts)
    shared = parts[-1].common
    if shared is not None:
        entries = [entry.fragment for entry in parts[-1].entries]
        assert coverage(entries[: shared.entry_count]) == shared.coverage


def test_a_tensor_given_twice_is_refused() -> None:
    described = Described.of([fragment("fp32", "w", 8)], chunk_bytes=CHUNK)
    with pytest.raises(InvalidLayoutError, match="fp32:w"):
        described.extend([fragment("fp32", "w", 8)])
    with pytest.raises(InvalidLayoutError):
        lay_out(described, [fragment("weight", "v", 8)], [2])


def test_what_the_format_does_not_take_is_found_once_for_all_saves() -> None:
    assert Described.of([fragment("fp32", "w", 8)], chunk_bytes=CHUNK).is_storable
    with pytest.raises(FormatError):
        _ = Described.of([fragment("fp32", "w" * 5000, 8)], chunk_bytes=CHUNK).is_storable


def test_the_last_blobs_are_not_in_common() -> None:
    blob = replace(fragment("blob", "job", 3), dtype="uint8")
    assert common_count([fragment("fp32", "w", 8), blob, blob]) == 1
    assert common_count([blob]) == common_count([]) == 0
    assert pack([], chunk_bytes=CHUNK).chunks == ()
