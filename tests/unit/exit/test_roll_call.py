"""How a rank whose script has ended learns whether the others go on without it."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from spotspeed import roll_call as roll_calls
from spotspeed.coordinator.coordinator import Cut
from spotspeed.errors import CaptureError, CoordinationError
from spotspeed.exit import UnknownExit
from spotspeed.roll_call import RollCall, is_roll_call
from spotspeed.state import boundary

WAIT_S = 20.0


def cut_of(source: str, step: int = 3, *, stop: bool = False) -> Cut:
    return Cut(1, step, stop, "c0001", 0, source, None, ())


def engine_at(step: int, *, forwards: int) -> SimpleNamespace:
    engine = SimpleNamespace(global_steps=step)
    vars(engine)[boundary._KEY] = SimpleNamespace(forwards=forwards)
    return engine


class Others:
    """What the other ranks answer to every question of rank 1, which stands at step 3."""

    def __init__(self, answer: str = "", *, step: int = 3) -> None:
        self.answer, self.step = answer, step
        self.asked = threading.Event()
        self.gone = threading.Event()
        coordinator = SimpleNamespace(request_snapshot=self.reply, desert=self.gone.set)
        self.roll_call = RollCall(engine_at(3, forwards=3), 1, coordinator)

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
    monkeypatch.setattr(roll_calls, "DOUBTFUL_STUCK_S", 0.02)


def test_a_rank_that_ends_while_another_trains_on_deserts_and_says_why() -> None:
    others = Others("past: 4 forwards of the training begun, 3 by rank 1")
    with pytest.raises(CoordinationError, match="rank 0: past: 4 forwards"):
        others.wait()


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
@pytest.mark.parametrize("answer", ["", "stuck: in all_reduce+1"])
def test_a_rank_that_ends_in_order_waits_for_those_that_take_longer(
    error: BaseException | None, answer: str
) -> None:
    others = Others(answer)
    with others.roll_call.calling(error):
        for _ in range(5):
            others.asked.clear()
            assert others.asked.wait(WAIT_S)
    assert not others.gone.is_set() and not others.roll_call.why


def test_answers_tell_who_is_past_and_who_may_still_end() -> None:
    def answer(source: str, rank: int = 0, forwards: int = 4) -> str:
        return RollCall(engine_at(3, forwards=forwards), rank, None).answer(source)

    asked = "roll call by rank 1 after 3 forwards"
    assert answer(asked).startswith("past: 4 forwards of the training begun, 3 by rank 1")
    assert answer(asked, forwards=3) == ""
    assert answer(asked, rank=1) == ""
    assert answer("periodic") == ""


def test_a_rank_that_has_ended_itself_is_past_nobody() -> None:
    others = Others()
    with others.roll_call.calling(None):
        assert others.roll_call.answer("roll call by rank 0 after 1 forwards") == ""


def test_what_an_interrupted_update_has_left_is_refused() -> None:
    others = Others()
    others.roll_call.refuse_torn()
    others.roll_call.is_updating = True
    with pytest.raises(CaptureError, match="update 4 has begun here and did not end"):
        others.roll_call.refuse_torn()
