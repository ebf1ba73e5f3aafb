"""What may be removed, and what never."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from spotspeed.core.lineage import Place
from spotspeed.core.retention import (
    Keep,
    Remains,
    Removal,
    Sealed,
    Unfinished,
    Work,
    is_hopeless,
    plan_removal,
)


def sealed(*specs: tuple[int, int] | tuple[int, int, str], on_lineage: bool = True) -> list[Sealed]:
    """Newest first, from (epoch, step[, reason])."""
    items = []
    for epoch, step, *reason in specs:
        kind = reason[0] if reason else "periodic"
        items.append(Sealed(f"e{epoch}-s{step}-{kind}", epoch, step, kind, on_lineage))
    return sorted(items, key=lambda item: (item.epoch, item.step), reverse=True)


def removed(
    items: Sequence[Sealed], unfinished: Sequence[Unfinished] = (), *, last: int = 2,
    every: int | None = None, epoch: int = 1,
) -> set[str]:  # fmt: skip
    plan = plan_removal(items, unfinished, keep=Keep(last, every), epoch=epoch)
    return {removal.directory for removal in plan}


def test_the_newest_stay_and_older_ones_go() -> None:
    items = sealed((1, 10), (1, 20), (1, 30), (1, 40))
    assert removed(items) == {"e1-s10-periodic", "e1-s20-periodic"}


def test_explicit_saves_neither_go_nor_count() -> None:
    items = sealed((1, 10), (1, 20), (1, 30, "explicit"), (1, 40, "explicit"), (1, 50, "explicit"))
    assert removed(items) == set()


def test_explicit_saves_go_when_they_were_given_up_but_for_the_newest() -> None:
    all_four = sealed(*((1, step, "explicit") for step in (10, 20, 30, 40)))
    items = [replace(item, is_given_up=item.step != 20) for item in all_four]
    assert removed(items) == {"e1-s10-explicit", "e1-s30-explicit"}
    lost = [replace(item, is_on_lineage=False) for item in items]
    assert removed([*sealed((2, 50)), *sealed((1, 5)), *lost], epoch=2) == {
        "e1-s10-explicit", "e1-s30-explicit", "e1-s40-explicit",
    }  # fmt: skip


def test_notice_and_final_saves_follow_the_rule() -> None:
    items = sealed((1, 10, "notice"), (1, 20, "final"), (1, 30), (1, 40))
    assert removed(items) == {"e1-s10-notice", "e1-s20-final"}


def test_the_first_at_or_after_each_multiple_stays_for_ever() -> None:
    items = sealed(*((1, step) for step in (50, 90, 110, 150, 200, 250, 310, 320)))
    gone = removed(items, last=1, every=100)
    assert gone == {f"e1-s{step}-periodic" for step in (50, 90, 150, 250)}
    kept = [item for item in items if item.directory not in gone]
    assert removed(kept, last=1, every=100) == set()


def test_removing_never_waits_for_the_rule_to_be_applied_each_time() -> None:
    """Applied after every save or only at the end, the same checkpoints remain."""
    kept: list[Sealed] = []
    for step in range(10, 500, 30):
        kept = [*sealed((1, step)), *kept]
        gone = removed(kept, last=2, every=100)
        kept = [item for item in kept if item.directory not in gone]
    all_at_once = sealed(*((1, step) for step in range(10, 500, 30)))
    gone = removed(all_at_once, last=2, every=100)
    assert kept == [item for item in all_at_once if item.directory not in gone]


def test_what_is_off_the_lineage_goes_once_the_epoch_has_sealed() -> None:
    lost = sealed((1, 30), on_lineage=False)
    before = [*lost, *sealed((1, 10), (1, 20))]
    assert removed(before, epoch=2) == set()
    after = [*sealed((2, 21)), *before]
    assert removed(after, epoch=2, last=5) == {"e1-s30-periodic"}


def test_an_explicit_save_off_the_lineage_stays() -> None:
    items = [*sealed((2, 21)), *sealed((1, 30, "explicit"), on_lineage=False), *sealed((1, 20))]
    assert removed(items, epoch=2) == set()


def test_a_job_that_began_anew_keeps_the_newest_of_the_old_history() -> None:
    items = [*sealed((2, 5)), *sealed((1, 10), (1, 20), (1, 500), on_lineage=False)]
    assert removed(items, epoch=2) == {"e1-s10-periodic", "e1-s20-periodic"}


def test_unfinished_saves_of_this_epoch_go_only_when_they_are_hopeless() -> None:
    items = sealed((2, 30), (2, 40))
    left = [Unfinished("mine", 2), Unfinished("lost", 2, is_hopeless=True)]
    assert removed(items, left, epoch=2) == {"lost"}
    assert removed([], left, epoch=2) == {"lost"}
    assert removed([*sealed((3, 50)), *items], left, epoch=2) == set()


def test_a_save_is_hopeless_when_nobody_can_complete_it() -> None:
    newest = Place(2, 40)
    older = Remains("older", 30, "periodic", is_complete=False)
    newer = replace(older, step=41)
    asked = replace(older, reason="explicit")
    bare, bare_newer = replace(older, reason=None), replace(newer, reason=None)
    alive = Work(has_tiers=False)
    assert is_hopeless(older, alive, newest=newest)
    assert is_hopeless(asked, alive, newest=newest)
    for waits in (newer, replace(older, step=40), replace(older, is_complete=True)):
        assert not is_hopeless(waits, alive, newest=newest)
    assert not is_hopeless(older, alive, newest=None)
    assert not is_hopeless(older, replace(alive, in_flight=frozenset({"older"})), newest=newest)
    over = replace(alive, is_over=True)
    assert is_hopeless(newer, over, newest=newest) and is_hopeless(newer, over, newest=None)
    assert not is_hopeless(replace(newer, is_complete=True), over, newest=newest)
    tiered = Work(is_over=True, has_tiers=True)
    assert is_hopeless(older, tiered, newest=newest)
    assert not is_hopeless(asked, tiered, newest=newest)
    assert not is_hopeless(newer, tiered, newest=newest)
    assert is_hopeless(bare, tiered, newest=newest)
    assert is_hopeless(bare_newer, tiered, newest=None), "no part of it is complete at the store"


def test_leftovers_of_older_epochs_wait_for_a_seal_of_this_one() -> None:
    leftovers = [Unfinished("left", 1)]
    assert removed(sealed((1, 10)), leftovers, epoch=2) == set()
    assert removed(sealed((2, 11), (1, 10)), leftovers, epoch=2) == {"left"}


def test_a_launch_that_was_taken_over_removes_nothing() -> None:
    items = sealed((1, 10), (1, 20), (1, 30), (2, 31))
    assert removed(items, [Unfinished("left", 1)], epoch=1, last=1) == set()


reasons = st.sampled_from(["periodic", "notice", "final", "explicit"])
histories = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 50), reasons, st.booleans()), max_size=25,
    unique_by=lambda row: row[:2],
)  # fmt: skip


@given(rows=histories, last=st.integers(1, 4), every=st.none() | st.integers(1, 20),
       epoch=st.integers(1, 3))  # fmt: skip
def test_no_history_loses_what_must_stay(
    rows: list[tuple[int, int, str, bool]], last: int, every: int | None, epoch: int
) -> None:
    items = sorted(
        (Sealed(f"{e}-{s}", e, s, reason, on or e == 3) for e, s, reason, on in rows),
        key=lambda item: (item.epoch, item.step), reverse=True,
    )  # fmt: skip
    left = [Unfinished(f"u{e}", e) for e in (1, 2, 3)]
    plan = plan_removal(items, left, keep=Keep(last, every), epoch=epoch)
    assert all(isinstance(removal, Removal) and removal.reason for removal in plan)
    gone = {removal.directory for removal in plan}
    path = [item for item in items if item.is_on_lineage]
    assert not gone & {item.directory for item in items if item.reason == "explicit"}
    assert not path or path[0].directory not in gone
    ruled = [item for item in path if item.reason != "explicit"]
    assert not gone & {item.directory for item in ruled[:last]}
    assert not gone & {f"u{e}" for e in range(epoch, 4)}
    if items:
        assert len(gone & {item.directory for item in items}) < len(items)
