"""How a rank whose script has ended learns whether the others go on without it."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from spotspeed import roll_call as roll_calls
from spotspeed.coordinator.coordinator import Cut
from spotspeed.errors import CaptureError, CoordinationError
from spotspeed.exit import UnknownExit
from spotspeed.roll_call import RollCall, is_roll_call, where
from spotspeed.state import boundary

WAIT_S = 20.0


def cut_of(source: str, step: int = 3, *, stop: bool = False) -> Cut:
    return Cut(1, step, stop, "c0001", 0, source, None, ())


def engine_at(step: int, *, forwards: int, micro_steps: int = 3) -> SimpleNamespace:
    engine = SimpleNamespace(global_steps=step, micro_steps=micro_steps)
    vars(engine)[boundary._KEY] = SimpleNamespace(forwards=forwards)
    return engine


class Others:
    """What the other ranks answer to every question of rank 1, which stands at step 3."""

    def __init__(self, answer: str = "", *, step: int = 3, midway: int = 0) -> None:
        self.answer, self.step = answer, step
        self.asked = threading.Event()
        self.gone = threading.Event()
        coordinator = SimpleNamespace(request_snapshot=self.reply, desert=self.gone.set)
        engine = engine_at(3, forwards=3)
        self.roll_call = RollCall(engine, 1, coordinator)
        self.roll_call.updated()
        vars(engine)[boundary._KEY].forwards += midway

    def reply(self, source: str) -> None:
        cut = cut_of(source, self.step)
        assert is_roll_call(cut)
        self.roll_call.agreed(cut)
        self.roll_call.settled(cut, f"rank 0: {self.answer}" if self.answer else "nobody saved")
        self.asked.set()

    def wait(self, error: BaseException | None = None) -> None:
        """Rank 1 waits for the others, until it deserts them."""
        with self.roll_call.calling(error):
            assert self.gone.wait(WAIT_S)
            raise CoordinationError("the wait has ended")


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_calls, "ASK_S", 0.01)
    monkeypatch.setattr(roll_calls, "PAST_S", 0.02)
    monkeypatch.setattr(roll_calls, "WAITING_S", 0.02)
    monkeypatch.setattr(roll_calls, "DOUBTFUL_STUCK_S", 0.02)


def test_a_rank_that_ends_while_another_trains_on_deserts_and_says_why() -> None:
    others = Others("past: 4 micro-steps trained, 3 by rank 1")
    with pytest.raises(CoordinationError, match="rank 0: past: 4 micro-steps"):
        others.wait()


@pytest.mark.parametrize("answer", ["blocked: 4 forwards; in all_reduce+1", "waiting: in reduce+1"])
def test_a_rank_that_ends_in_a_step_believes_those_who_wait_in_its_collectives(answer) -> None:
    with pytest.raises(CoordinationError, match=re.escape(answer)):
        Others(answer, midway=1).wait()


def test_after_an_error_a_forward_that_another_has_begun_is_reason_enough() -> None:
    with pytest.raises(CoordinationError, match="ahead: 4 forwards"):
        Others("ahead: 4 forwards of the training begun, 3 by rank 1").wait(SystemExit(1))


def test_a_rank_that_ends_before_a_step_that_another_has_begun_deserts_at_once() -> None:
    with pytest.raises(CoordinationError, match="a rank has begun step 4"):
        Others(step=4).wait()


def test_a_stop_at_a_later_step_that_was_agreed_before_the_end_counts() -> None:
    others = Others()
    others.roll_call.agreed(cut_of("SIGTERM", 4, stop=True))
    with pytest.raises(CoordinationError, match="a rank has begun step 4"):
        others.wait()


@pytest.mark.parametrize("error", [KeyError(), SystemExit(75), UnknownExit()])
def test_after_an_error_a_rank_that_hangs_is_believed_to_wait(error: BaseException) -> None:
    with pytest.raises(CoordinationError, match="stuck: in all_reduce"):
        Others("stuck: in all_reduce+1 backward+2").wait(error)


@pytest.mark.parametrize("error", [None, SystemExit(0)])
@pytest.mark.parametrize(
    "answer", ["", "stuck: in all_reduce+1", "waiting: in reduce+1", "ahead: 9 forwards"]
)
def test_a_rank_that_ends_in_order_waits_for_those_that_take_longer(
    error: BaseException | None, answer: str
) -> None:
    others = Others(answer)
    with others.roll_call.calling(error):
        for _ in range(5):
            others.asked.clear()
            assert others.asked.wait(WAIT_S)
    assert not others.gone.is_set() and not others.roll_call.why


ASKED = "roll call by rank 1 after 3 forwards and 3 micro-steps"


def test_answers_tell_who_is_past_and_who_may_still_end() -> None:
    def answer(source: str, rank: int = 0, **progress: int) -> str:
        return RollCall(engine_at(3, **progress), rank, None).answer(source)

    trained = answer(ASKED, forwards=4, micro_steps=4)
    assert trained == "past: 4 micro-steps trained, 3 by rank 1"
    more = "ahead: 4 forwards of the training begun, 3 by rank 1"
    assert answer(ASKED, forwards=4) == more
    assert answer(ASKED, forwards=3) == ""
    assert answer(ASKED, forwards=4, micro_steps=4, rank=1) == ""
    assert answer("periodic", forwards=4, micro_steps=4) == ""


@pytest.mark.parametrize(
    ("outer", "inner", "kind"),
    [
        ("deepspeed/runtime/engine.py", "torch/distributed/c10d.py", "waiting"),
        ("deepspeed/runtime/engine.py", "torch/nn/linear.py", "stuck"),
        ("script.py", "torch/distributed/c10d.py", ""),
    ],
)
def test_a_rank_waits_in_a_collective_of_its_engine_only(outer, inner, kind) -> None:
    def caller(file: str) -> Callable[[Callable[[], Any]], Any]:
        names: dict[str, Any] = {}
        code = "def backward(call):\n    return call()\n"
        exec(compile(code, f"/site/{file}", "exec"), names)
        return names["backward"]

    found, place = caller(outer)(lambda: caller(inner)(lambda: where(sys._getframe(1))))
    assert found == kind
    assert place.startswith("backward+" if kind else "")


def test_a_rank_that_has_ended_itself_is_past_nobody() -> None:
    others = Others()
    with others.roll_call.calling(None):
        assert (
            others.roll_call.answer("roll call by rank 0 after 1 forwards and 1 micro-steps") == ""
        )


def test_what_an_interrupted_update_has_left_is_refused() -> None:
    others = Others()
    others.roll_call.refuse_torn()
    others.roll_call.is_updating = True
    with pytest.raises(CaptureError, match="update 4 has begun here and did not end"):
        others.roll_call.refuse_torn()
