"""Which checkpoints count after restarts, losses and rollbacks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotspeed.core.lineage import Place, place_of, trace_lineage
from spotspeed.core.manifest import Ticket
from spotspeed.errors import FormatError


def held(newest: int, restored: dict[int, Place | None], places: list[Place]) -> list[Place]:
    lineage = trace_lineage(newest, restored)
    return [place for place in places if lineage.holds(place)]


def places(*pairs: tuple[int, int]) -> list[Place]:
    return [Place(epoch, step) for epoch, step in pairs]


def test_a_single_epoch_counts_whole() -> None:
    history = places((1, 0), (1, 10), (1, 20))
    assert held(1, {1: None}, history) == history
    assert held(1, {}, history) == history


def test_what_lies_above_the_restored_step_is_off() -> None:
    history = places((1, 10), (1, 20), (1, 30), (2, 21), (2, 25))
    assert held(2, {2: Place(1, 20)}, history) == places((1, 10), (1, 20), (2, 21), (2, 25))


def test_a_limit_holds_for_all_epochs_behind_it() -> None:
    history = places((1, 10), (1, 20), (2, 21), (2, 30), (3, 11))
    restored = {2: Place(1, 20), 3: Place(1, 10)}
    assert held(3, restored, history) == places((1, 10), (3, 11))


def test_a_restored_epoch_carries_its_own_limit() -> None:
    history = places((1, 10), (1, 20), (2, 12), (2, 15), (2, 18), (3, 16))
    restored = {2: Place(1, 10), 3: Place(2, 15)}
    assert held(3, restored, history) == places((1, 10), (2, 12), (2, 15), (3, 16))


def test_a_branch_that_was_left_is_off_even_below_the_restored_step() -> None:
    history = places((1, 100), (2, 40), (2, 50), (3, 101))
    restored = {2: Place(1, 30), 3: Place(1, 100)}
    assert held(3, restored, history) == places((1, 100), (3, 101))


def test_an_epoch_that_began_with_nothing_ends_the_path() -> None:
    history = places((1, 500), (2, 0), (2, 10))
    assert held(2, {2: None}, history) == places((2, 0), (2, 10))


def test_an_epoch_that_has_not_chosen_yet_bounds_nothing() -> None:
    history = places((1, 10), (1, 20), (2, 15))
    restored = {2: Place(1, 10)}
    assert held(5, restored, history) == places((1, 10), (2, 15))
    assert held(2, {}, history) == history


def test_a_limit_reaches_through_an_epoch_without_record() -> None:
    history = places((1, 10), (1, 30), (2, 15), (2, 25), (3, 21))
    restored = {3: Place(2, 20)}
    assert held(3, restored, history) == places((1, 10), (2, 15), (3, 21))


def test_an_epoch_of_the_future_is_off() -> None:
    assert not trace_lineage(2, {}).holds(Place(3, 1))


@pytest.mark.parametrize("origin", [Place(2, 5), Place(3, 5), Place(0, 5)])
def test_a_record_that_is_not_before_its_epoch_is_refused(origin: Place) -> None:
    with pytest.raises(FormatError, match="epoch 2"):
        trace_lineage(2, {2: origin})


def test_every_history_of_four_epochs_agrees_with_the_definition() -> None:
    """Exhaustive: the lineage is what a walk over parents, checkpoint by checkpoint, reaches."""
    steps = (1, 2)
    spots = [Place(epoch, step) for epoch in (1, 2, 3) for step in steps]

    def origins(epoch: int) -> list[Place | str | None]:
        return ["unknown", None, *(place for place in spots if place.epoch < epoch)]

    count = 0
    for second, third, fourth in itertools.product(origins(2), origins(3), origins(4)):
        choice = {2: second, 3: third, 4: fourth}
        restored = {epoch: origin for epoch, origin in choice.items() if origin != "unknown"}
        lineage = trace_lineage(4, restored)  # type: ignore[arg-type]
        expected = _reachable(4, None, choice, spots)
        assert {place for place in spots if lineage.holds(place)} == expected, choice
        count += 1
    assert count == 4 * 6 * 8


def _reachable(
    epoch: int, limit: int | None, choice: dict[int, object], spots: list[Place]
) -> set[Place]:
    own = {p for p in spots if p.epoch == epoch and (limit is None or p.step <= limit)}
    origin = choice.get(epoch, "unknown")
    if epoch <= 1 or origin is None:
        return own
    if origin == "unknown":
        return own | _reachable(epoch - 1, limit, choice, spots)
    assert isinstance(origin, Place)
    bound = origin.step if limit is None else min(limit, origin.step)
    return own | _reachable(origin.epoch, bound, choice, spots)


@given(
    epoch=st.integers(1, 2**53), step=st.integers(0, 2**53),
    attempt=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_+=-]{0,40}", fullmatch=True),
)  # fmt: skip
def test_the_place_of_a_tickets_directory_is_the_tickets(
    epoch: int, step: int, attempt: str
) -> None:
    ticket = Ticket(epoch, step, attempt, "tag", "periodic", 1, 0)
    assert place_of(ticket.directory) == Place(epoch, step)


@pytest.mark.parametrize(
    "name", ["", "epochs", "latest", "global_step10", "step-1.e1.a", "step-000000000001.e000001.",
             "step-000000000001.e000001.a/b", "step-000000000001.e000001.a..b", "probe",
             "step-00000000000x.e000001.a", "Step-000000000001.e000001.a"],
)  # fmt: skip
def test_other_names_have_no_place(name: str) -> None:
    assert place_of(name) is None
