"""What the supervisor itself is told, and what it makes of hearing it again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from spotspeed.supervisor.ears import Ears
from spotspeed.supervisor.supervise import wait_unless_called


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def ears(said: list[str]) -> Iterator[Ears]:
    with Ears(said.append, watch_host=False) as ears:
        yield ears


def call(number: signal.Signals) -> None:
    """Signal this very thread, where it is blocked."""
    signal.pthread_kill(threading.get_ident(), number)


@pytest.mark.parametrize(("numbers", "heard", "is_urgent"), [
    ([signal.SIGINT], "SIGINT", False),
    ([signal.SIGINT, signal.SIGINT], "SIGINT", True),
    ([signal.SIGTERM, signal.SIGTERM], "SIGTERM", False),
    ([signal.SIGHUP, signal.SIGINT], "SIGHUP", True),
    ([signal.SIGQUIT], "SIGQUIT", True),
    ([signal.SIGTSTP], None, False),
])  # fmt: skip
def test_the_first_is_a_notice_and_a_person_who_repeats_it_means_now(
    ears: Ears, said: list[str], numbers: list[signal.Signals], heard: str, is_urgent: bool
) -> None:
    for number in numbers:
        call(number)
        ears.listen()
    assert (ears.heard, ears.is_urgent) == (heard, is_urgent)
    assert bool(said) is (signal.SIGTSTP in numbers)


@pytest.mark.parametrize("before", [[], [signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM]])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_calls_again_does_not_wait_for_the_saver(
    ears: Ears, said: list[str], before: list[signal.Signals], number: signal.Signals
) -> None:
    for earlier in before:
        call(earlier)
        ears.listen()
    is_over, has_begun = threading.Event(), threading.Event()

    def work() -> bool:
        has_begun.set()
        return is_over.wait(60.0)

    main = threading.get_ident()

    def caller() -> None:
        has_begun.wait(60.0)
        while not said:
            signal.pthread_kill(main, number)

    thread = threading.Thread(target=caller)
    thread.start()
    assert not wait_unless_called(work, ears, said.append)
    thread.join()
    is_over.set()
    assert said == ["not waiting for the saver, which goes on by itself"]
    while signal.sigtimedwait({number}, 0) is not None:
        continue


@pytest.mark.parametrize("answer", [True, False])
def test_a_saver_that_is_done_is_believed(ears: Ears, said: list[str], answer: bool) -> None:
    call(signal.SIGTERM)
    ears.listen()
    assert wait_unless_called(lambda: answer, ears, said.append) is answer
    assert not said
