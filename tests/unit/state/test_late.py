"""Late state: recorded when a step ends, waited for by a save, absent when nobody can wait."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from spotspeed import events
from spotspeed.errors import CaptureError, ConfigError, FormatError
from spotspeed.state.late import LATE, LateState, Source, frozen


class Counter:
    """What a loop counts after each step."""

    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Data(Counter):
    """A source of data: it has handed out the next batch when the step ends."""

    def __iter__(self) -> Any:
        return iter(())


def value_of(stored: dict[str, Any], name: str, kind: type[Counter] = Counter) -> Any:
    fresh = kind(None)
    LateState({name: fresh}).load({LATE: {name: stored[LATE][name]}})
    return fresh.value


def test_counts_are_those_of_the_end_and_data_is_that_of_the_update() -> None:
    counter, data = Counter(0), Data(0)
    late = LateState({"counter": counter, "data": data})
    for step in (1, 2):
        late.updated(step)
        counter.value, data.value = step, 10 * step
        late.end(step)
        counter.value = data.value = -1
        data.value = 10 * step
    first, second = late.stored(1), late.stored(2)
    assert [value_of(s, "counter") for s in (first, second)] == [1, 2]
    assert [value_of(s, "data", Data) for s in (first, second)] == [0, 10]


def test_a_record_is_a_copy() -> None:
    counter = Counter({"list": [1], "tensor": torch.zeros(2)})
    late = LateState({"counter": counter})
    late.end(1)
    counter.value["list"].append(2)
    counter.value["tensor"].fill_(9)
    found = value_of(late.stored(1), "counter")
    assert found["list"] == [1] and found["tensor"].tolist() == [0, 0]


def test_a_step_that_has_not_ended_is_absent_and_said() -> None:
    late, heard = LateState({"counter": Counter()}), []
    late.updated(3)
    events.add_sink(heard.append)
    try:
        assert late.stored(3) == {LATE: None} and late.stored(2) == {LATE: None}
    finally:
        events.remove_sink(heard.append)
    assert all(isinstance(event, events.Lost) for event in heard) and len(heard) == 2
    with pytest.raises(FormatError, match="late: absent"):
        late.check({LATE: None})
    late.check({})
    LateState().check({LATE: None})


def test_without_anything_registered_nothing_is_stored_or_asked_for() -> None:
    late = LateState()
    late.updated(1)
    late.end(1)
    late.await_end(1, Future())
    assert late.stored(1) == {} and not late


def waiting(late: LateState, step: int, over: Future[Any]) -> threading.Thread:
    thread = threading.Thread(target=late.await_end, args=(step, over), daemon=True)
    thread.start()
    return thread


def test_a_save_waits_until_its_step_has_ended() -> None:
    late, begun = LateState({"counter": Counter(7)}), threading.Event()
    over: Future[Any] = Future()
    late.updated(1)
    found: list[Any] = []

    def save() -> None:
        begun.set()
        late.await_end(1, over)
        found.append(late.stored(1))

    thread = threading.Thread(target=save, daemon=True)
    thread.start()
    assert begun.wait(30) and not found
    late.end(1)
    thread.join(30)
    assert value_of(found[0], "counter") == 7


@pytest.mark.parametrize("how", ["over", "close", "hurry"])
def test_nobody_waits_for_ever(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spotspeed.state.late.GRACE_S", 0.0)
    late, over = LateState({"counter": Counter()}), Future()
    late.updated(1)
    thread = waiting(late, 1, over)
    {"over": lambda: over.set_result(None), "close": late.close, "hurry": late.hurry}[how]()
    thread.join(30)
    assert not thread.is_alive()


def test_only_the_last_two_steps_are_kept() -> None:
    late = LateState({"counter": Counter()})
    for step in (1, 2, 3):
        late.updated(step)
        late.end(step)
    assert late.stored(1) == {LATE: None} and late.stored(2)[LATE] and late.stored(3)[LATE]


def test_what_cannot_be_stored_is_refused_at_once_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'loop'.*state_dict"):
        LateState({"loop": object()})  # type: ignore[dict-item]
    with pytest.raises(CaptureError, match=r"state 'loop'\['value'\]"):
        LateState({"loop": Counter(object())})


def test_what_becomes_unstorable_later_makes_that_record_absent() -> None:
    counter = Counter(1)
    late = LateState({"loop": counter})
    counter.value = object()
    late.end(1)
    assert late.stored(1) == {LATE: None}


def test_an_object_that_refuses_its_state_is_named() -> None:
    late = LateState({"loop": Counter(1)})
    late.end(1)
    stored = late.stored(1)

    class Refusing(Counter):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("epoch")

    with pytest.raises(FormatError, match=r"state 'loop': .*epoch"):
        LateState({"loop": Refusing()}).load(stored)
    assert LateState({"other": Counter(5)}).load(stored) == [
        "state 'other' is not in it: left as it is"
    ]


def test_what_a_framework_restores_is_stored_and_not_asked_for() -> None:
    late = LateState()
    late.add("framework", Source(lambda: frozen(5, what="five")))
    late.updated(1)
    late.check({LATE: None})
    late.end(1)
    assert late.stored(1)[LATE]["framework"] and late.load({}) == []


def test_a_loaders_place_that_is_another_ranks_is_said_to_be() -> None:
    late = LateState({"counter": Counter(1), "data": Data(2)})
    late.updated(1)
    late.end(1)
    stored = late.stored(1)
    assert late.load(stored) == []
    (note,) = late.load(stored, is_own=False)
    assert note.startswith("'data': every rank has the state of rank 0") and "batches()" in note
