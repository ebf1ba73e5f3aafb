"""Cut messages on the wire: everything comes back as it was, and nothing else gets in."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotspeed.core.cut_messages import (
    Closed,
    Cut,
    Decide,
    Fence,
    Gather,
    Gathered,
    Leave,
    Notice,
    Outcome,
    Phase,
    Report,
    RoundView,
    Status,
    Term,
    Wish,
    decode,
    encode,
)
from spotspeed.errors import FormatError

numbers = st.integers(0, 2**63 - 1)
texts = st.text(max_size=40)
seconds = st.none() | st.floats(-1e6, 1e6)
ranks = st.lists(st.integers(0, 65535), max_size=5).map(tuple)
cuts = st.builds(Cut, numbers, numbers, st.booleans(), texts, numbers, texts, seconds, ranks)
views = st.builds(RoundView, cuts, st.sampled_from(Phase), st.none() | texts, texts)
messages = st.one_of(
    st.builds(Notice, numbers, st.sampled_from(Wish), seconds, texts),
    st.builds(Decide, cuts),
    st.builds(Report, numbers, st.sampled_from(Phase), numbers, st.none() | texts, texts),
    st.builds(Outcome, numbers, st.booleans(), st.none() | texts, texts),
    st.builds(Leave, numbers, st.none() | texts, texts),
    st.builds(Fence, ranks, texts),
    st.builds(Status, numbers, numbers, seconds, st.lists(views, max_size=3).map(tuple)),
    st.builds(Closed),
    st.builds(Gather, numbers, texts, st.binary(max_size=50)),
    st.builds(Gathered, numbers, st.lists(st.binary(max_size=9)).map(tuple), texts, ranks),
)
terms = st.builds(Term, numbers, numbers)


@given(terms, messages)
def test_every_message_comes_back_as_it_was(term: Term, message: object) -> None:
    assert decode(encode(term, message), source="rank 1") == (term, message)


@given(st.binary(max_size=200))
def test_noise_is_refused_by_name(data: bytes) -> None:
    try:
        decode(data, source="rank 7")
    except FormatError as error:
        assert str(error).startswith("rank 7: ")


@given(terms, messages, st.data())
def test_a_damaged_message_is_refused_or_another_valid_one(
    term: Term, message: object, data: st.DataObject
) -> None:
    raw = bytearray(encode(term, message))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = decode(bytes(raw), source="rank 7")
    except FormatError:
        return
    assert decode(encode(*found), source="rank 7") == found


@pytest.mark.parametrize(("raw", "what"), [
    ([], "array of three"),
    ({}, "array of three"),
    (None, "array of three"),
    ([99, 0, 0], "code 99 is unknown"),
    ([True, 0, 0], "code True is unknown"),
    ([3, 0, 0, -1], "Prepare.round is -1"),
    ([3, 0, 0, True], "Prepare.round is True"),
    ([3, 0, 0, 2**63], "Prepare.round is"),
    ([3, 0, 0, "1"], "Prepare.round is '1'"),
    ([3, 0, 0], "Prepare has 1 fields"),
    ([3, 0, 0, 1, 2], "Prepare has 1 fields"),
    ([3, 0, -1, 1], "Term.leader is -1"),
    ([1, 0, 0, 1, 9, None, ""], "no wish"),
    ([1, 0, 0, 1, 2, float("nan"), ""], "expected seconds"),
    ([1, 0, 0, 1, 2, None, "x" * 5000], "expected text"),
    ([5, 0, 0, 1, 77, 0, None, ""], "no phase"),
    ([4, 0, 0, [1, 2]], "Cut has 8 fields"),
    ([13, 0, 0, 1, "label", "text"], "expected bytes"),
])  # fmt: skip
def test_what_is_no_message_is_refused_with_the_reason(raw: object, what: str) -> None:
    with pytest.raises(FormatError, match="rank 3: ") as caught:
        decode(msgpack.packb(raw), source="rank 3")
    assert what in str(caught.value)
