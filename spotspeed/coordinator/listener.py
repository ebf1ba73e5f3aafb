"""Whom the coordinator tells what the ranks agree on, and how it tells it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from spotspeed import events
from spotspeed.coordinator.signals import SignalListener
from spotspeed.core.cut_messages import Cut

STEP_BITS = 40
STEP_MASK = (1 << STEP_BITS) - 1
"""A position is generation << STEP_BITS | step; every load of a state begins a generation."""
ROLL_CALL = "roll call"
"""How the source of a cut begins that only asks where the ranks are: nobody is told of it."""


class CutListener(Protocol):
    """Told on one thread what the ranks agree on; every method must return at once."""

    def on_notice(self, source: str, seconds_left: float) -> None:
        """This rank was told to stop; all ranks will agree on a step."""
        ...

    def on_agreed(self, cut: Cut) -> None:
        """All ranks are to stand at `cut.step`; `on_capture` follows where this one does."""
        ...

    def on_capture(self, cut: Cut) -> None:
        """The state is that of `cut.step`, and stays so until `report_staged(cut.round)`.

        Before `start` the step is -1: nothing has been trained or restored yet.

        Must lead to `report_staged` and `report_durable`, or to `report_failed`, from any thread.
        Several captures may be open, also of one step: one save may answer both.
        """
        ...

    def on_outcome(self, cut: Cut, digest: str | None, why: str) -> None:
        """The round is over: sealed under `digest`, or None: not known durable, because of `why`.

        None before this rank has reported staged: forget the copy before returning, for the state
        changes as soon as this returns. None after that: the savers may still seal it.
        """
        ...

    def on_peer_lost(self, rank: int, why: str) -> None:
        """A rank is gone; a stopping round among the survivors follows."""
        ...

    def leave(self, why: str) -> None:
        """End the process now: all may leave, and the main thread is not at the gate in time."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """One source of notices by signal, and what a signal of it means."""

    signals: SignalListener
    seconds_left: float


class Teller:
    """Tells a listener; what it raises must not end the agreement of all ranks.

    `failed(round, why)` and `delivered(round)` answer the machine. Belongs to one thread.
    """

    def __init__(
        self,
        listener: CutListener,
        *,
        failed: Callable[[int, str], None],
        delivered: Callable[[int], None],
    ) -> None:
        self._listener = listener
        self._failed = failed
        self._delivered = delivered
        self._heard_at: float | None = None

    def notice(self, source: str, seconds_left: float, now: float) -> None:
        """This rank has heard a notice at `now`."""
        self._heard_at = self._heard_at or now
        self._tell(lambda: self._listener.on_notice(source, seconds_left))

    def capture(self, cut: Cut) -> None:
        """Hand the capture over."""
        failure = self._tell(lambda: self._listener.on_capture(public(cut)))
        if failure is not None:
            self._failed(cut.round, failure)

    def settle(self, cut: Cut, digest: str | None, why: str) -> None:
        """Tell the outcome, then let the training change what was still being copied."""
        self._tell(lambda: self._listener.on_outcome(public(cut), digest, why))
        self._delivered(cut.round)

    def agreed(self, cut: Cut, now: float) -> None:
        """This rank has known the step since `now`."""
        self._tell(lambda: self._listener.on_agreed(public(cut)))
        if cut.source.startswith(ROLL_CALL):
            return
        latency_s = now - self._heard_at if self._heard_at is not None else 0.0
        agreed = events.Agreed(cut.step & STEP_MASK, cut.round, cut.stop, latency_s)
        self._tell(lambda: events.emit(agreed))
        self._heard_at = None

    def peer_lost(self, rank: int, why: str) -> None:
        """A rank is gone."""
        self._tell(lambda: self._listener.on_peer_lost(rank, why))

    def leave(self, why: str) -> None:
        """The main thread is somewhere else, in a dead collective perhaps."""
        self._tell(lambda: self._listener.leave(why or "all ranks leave"))

    def _tell(self, call: Callable[[], None]) -> str | None:
        try:
            call()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            events.emit(events.Lost("what the ranks agreed on, for a listener failed", failure))
            return failure
        return None


def public(cut: Cut) -> Cut:
    """`cut` with the optimizer step instead of the position; -1 before `start`."""
    return replace(cut, step=cut.step & STEP_MASK if cut.step > STEP_MASK else -1)
