"""What a supervisor makes of a launch's end, and the numbers of ranks that it starts again with."""

from __future__ import annotations

import pytest

from spotspeed.core.relaunch import (
    Batch,
    Ending,
    Fits,
    Policy,
    Traces,
    Verdict,
    choose_ranks,
    decide,
    judge,
)

DURABLE = Verdict(Ending.DURABLE, 75, "durable")


@pytest.mark.parametrize(("traces", "ending", "code"), [
    (Traces(0), Ending.DONE, 0),
    (Traces(0, attached=2, closed=2), Ending.DONE, 0),
    (Traces(75), Ending.DURABLE, 75),
    (Traces(1, rank_codes=(75, 75)), Ending.DURABLE, 75),
    (Traces(1, rank_codes=(143,)), Ending.DURABLE, 143),
    (Traces(1, rank_codes=(76, 75)), Ending.DURABLE, 75),
    (Traces(1, rank_codes=(76,)), Ending.NOT_DURABLE, 76),
    (Traces(76), Ending.NOT_DURABLE, 76),
    (Traces(1, rank_codes=(77,)), Ending.REFUSED, 77),
    (Traces(77), Ending.REFUSED, 77),
    (Traces(137, rank_codes=(76,), is_notice_sealed=True), Ending.DURABLE, 75),
    (Traces(137, attached=2, is_notice_sealed=True), Ending.DURABLE, 75),
    (Traces(0, attached=2, closed=2, is_notice_sealed=True), Ending.DONE, 0),
    (Traces(0, attached=2), Ending.LOST, 76),
    (Traces(137, attached=2), Ending.LOST, 137),
    (Traces(247), Ending.LOST, 247),
    (Traces(1), Ending.FAILED, 1),
    (Traces(139), Ending.FAILED, 139),
    (Traces(139, attached=2), Ending.FAILED, 139),
    (Traces(1, rank_codes=(76,), errors=("ValueError",)), Ending.FAILED, 1),
    (Traces(75, rank_codes=(75,), errors=("ValueError",)), Ending.FAILED, 1),
    (Traces(3, attached=1, closed=1, errors=("SystemExit",)), Ending.FAILED, 3),
    (Traces(1, rank_codes=(77,), errors=("ValueError",)), Ending.REFUSED, 77),
    (Traces(1, attached=2), Ending.LOST, 1),
    (Traces(1, attached=2, closed=2), Ending.FAILED, 1),
    (Traces(143, is_noticed=True, is_ended=True), Ending.NOT_DURABLE, 76),
    (Traces(1, attached=2, is_noticed=True, is_ended=True), Ending.NOT_DURABLE, 76),
    (Traces(137, attached=2, is_noticed=True), Ending.NOT_DURABLE, 76),
    (Traces(9, is_noticed=True), Ending.FAILED, 9),
    (Traces(0, is_noticed=True, is_ended=True), Ending.DONE, 0),
])  # fmt: skip
def test_the_ranks_and_the_store_decide_before_the_launchers_code(
    traces: Traces, ending: Ending, code: int
) -> None:
    verdict = judge(traces)
    assert (verdict.ending, verdict.code) == (ending, code)


@pytest.mark.parametrize("ending", [Ending.DONE, Ending.REFUSED, Ending.FAILED])
def test_what_a_new_start_does_not_cure_is_not_started_again(ending: Ending) -> None:
    decision = decide(Verdict(ending, 1, "so"), Policy(), past_s=(), now_s=0.0, is_doomed=False)
    assert not decision.relaunch


def test_a_doomed_supervisor_does_not_start_again() -> None:
    assert not decide(DURABLE, Policy(), past_s=(), now_s=0.0, is_doomed=True).relaunch


def test_the_first_restart_is_immediate_and_later_ones_wait_ever_longer() -> None:
    policy = Policy(max_restarts=9, backoff_s=1.0, backoff_max_s=5.0)
    delays = [
        decide(DURABLE, policy, past_s=[0.0] * count, now_s=1.0, is_doomed=False).delay_s
        for count in range(5)
    ]
    assert delays == [0.0, 2.0, 4.0, 5.0, 5.0]


def test_restarts_are_counted_within_the_window_only() -> None:
    policy = Policy(max_restarts=2, window_s=10.0)
    past = [0.0, 4.0]
    assert not decide(DURABLE, policy, past_s=past, now_s=9.0, is_doomed=False).relaunch
    assert decide(DURABLE, policy, past_s=past, now_s=10.0, is_doomed=False).relaunch


@pytest.mark.parametrize(("slots", "ranks"), [(8, 6), (6, 6), (5, 3), (4, 3), (3, 3), (2, 2)])
def test_the_most_ranks_are_chosen_that_keep_the_global_batch(slots: int, ranks: int) -> None:
    assert choose_ranks(slots, Batch(train=6, micro=1)).ranks == ranks


def test_a_micro_batch_limits_the_ranks_too() -> None:
    assert choose_ranks(4, Batch(train=8, micro=4)).ranks == 2
    assert choose_ranks(4, Batch(train=8, micro=3)).ranks == 0


def test_too_few_ranks_are_none_and_the_reason_names_the_numbers() -> None:
    choice = choose_ranks(5, Batch(train=6, micro=1), min_ranks=4)
    assert choice.ranks == 0
    assert "5 slots" in choice.reason and "at least 4" in choice.reason


def test_without_a_batch_every_slot_is_used() -> None:
    assert choose_ranks(5, None).ranks == 5
    assert choose_ranks(5, Fits(frozenset({1, 2, 4, 8}))).ranks == 4
    nothing = choose_ranks(0, None)
    assert nothing.ranks == 0 and nothing.reason.startswith("no slot is left")
