"""When a path may be taken over: every combination of what a claimant can see."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from spotspeed.core.owner import (
    STATES,
    Identity,
    Observation,
    OwnerRecord,
    Process,
    Verdict,
    decode_owner,
    encode_owner,
    may_take_over,
)
from spotspeed.errors import FormatError

OWNER = OwnerRecord(
    epoch=7, identity=Identity("node-3", "boot-a", "pid:[1]", 4711, 99), nonce="n",
    state="training", counter=12, period_s=5.0, claimed_unix_s=1000, renewed_unix_s=1060,
)  # fmt: skip


def look(process: Process, watched_s: float = 0.0, **changes: object) -> Observation:
    return Observation(OWNER, replace(OWNER, **changes), watched_s, process)  # type: ignore[arg-type]


def verdict(observed: Observation | None, *, take_over: bool = False) -> Verdict:
    return may_take_over(observed, now_unix_s=1100, take_over=take_over).verdict


def test_an_unowned_path_is_free() -> None:
    assert verdict(None) is Verdict.TAKE_OVER


def test_a_killed_owner_on_this_machine_is_replaced_without_watching() -> None:
    assert verdict(look(Process.GONE)) is Verdict.TAKE_OVER
    assert verdict(look(Process.GONE, counter=13)) is Verdict.TAKE_OVER


def test_a_running_owner_on_this_machine_is_refused_however_long_it_is_still() -> None:
    for watched_s in (0.0, 10.0, 10_000.0):
        assert verdict(look(Process.ALIVE, watched_s)) is Verdict.REFUSE


def test_a_remote_owner_is_watched_for_two_of_its_own_periods() -> None:
    decision = may_take_over(look(Process.UNKNOWN, 4.0), now_unix_s=1100, take_over=False)
    assert decision.verdict is Verdict.WATCH
    assert decision.wait_s == pytest.approx(6.0)
    assert verdict(look(Process.UNKNOWN, 9.99)) is Verdict.WATCH
    assert verdict(look(Process.UNKNOWN, 10.0)) is Verdict.TAKE_OVER


@pytest.mark.parametrize("change", [{"counter": 13}, {"epoch": 8}, {"nonce": "m"}])
def test_a_remote_owner_that_moves_is_refused_even_after_the_time(
    change: dict[str, object],
) -> None:
    assert verdict(look(Process.UNKNOWN, 3.0, **change)) is Verdict.REFUSE
    assert verdict(look(Process.UNKNOWN, 30.0, **change)) is Verdict.REFUSE


@pytest.mark.parametrize("state", ["draining", "released"])
@pytest.mark.parametrize("process", list(Process))
def test_an_owner_that_stopped_training_stands_in_nobodys_way(state: str, process: Process) -> None:
    assert verdict(look(process, state=state, counter=13)) is Verdict.TAKE_OVER


@pytest.mark.parametrize("process", list(Process))
def test_take_over_is_obeyed(process: Process) -> None:
    assert verdict(look(process, counter=13), take_over=True) is Verdict.TAKE_OVER


def test_a_refusal_names_host_pid_and_age() -> None:
    reason = may_take_over(look(Process.ALIVE), now_unix_s=1100, take_over=False).reason
    assert "node-3" in reason and "4711" in reason and "100 s" in reason


def test_every_observation_leads_to_a_verdict_with_a_reason() -> None:
    for process, state, watched_s, counter, take_over in itertools.product(
        Process, STATES, (0.0, 9.0, 10.0, 11.0), (12, 13), (False, True)
    ):
        observed = look(process, watched_s, state=state, counter=counter)
        decision = may_take_over(observed, now_unix_s=0, take_over=take_over)
        assert decision.reason
        assert (decision.wait_s > 0) is (decision.verdict is Verdict.WATCH)
        refusable = not take_over and state == "training" and process in (
            Process.ALIVE, Process.UNKNOWN
        )  # fmt: skip
        assert decision.verdict is Verdict.TAKE_OVER or refusable


def test_a_record_survives_its_stored_form() -> None:
    assert decode_owner(encode_owner(OWNER), source="owner.json") == OWNER
    renewed = OWNER.renewed(1200, "draining")
    assert (renewed.counter, renewed.state, renewed.renewed_unix_s) == (13, "draining", 1200)
    assert decode_owner(encode_owner(renewed), source="owner.json") == renewed


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"7", b'"x"', b"{}", b"\xff", b"[" * 100_000,
     b'{"identity": null}', b'{"identity": {"host": "h"}}'],
)  # fmt: skip
def test_a_damaged_record_is_a_format_error_that_names_the_file(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"owner\.json"):
        decode_owner(data, source="owner.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [("epoch", "7"), ("epoch", 0), ("counter", True), ("counter", -1), ("state", "sleeping"),
     ("period_s", 0), ("period_s", 1e9), ("period_s", None), ("nonce", 3)],
)  # fmt: skip
def test_a_record_with_a_wrong_field_is_refused(field: str, value: object) -> None:
    raw = json.loads(encode_owner(OWNER)) | {field: value}
    with pytest.raises(FormatError, match=r"owner\.json"):
        decode_owner(json.dumps(raw).encode(), source="owner.json")
