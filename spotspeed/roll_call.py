"""A rank whose script has ended finds out whether the others go on without it.

A script ends on all ranks, though not at once: one may write results for minutes after the others.
So a rank that ends waits for all, but not for ranks that in their turn wait for it in a collective
of the training. Nobody can tell the two apart but by where the others are: a rank that has begun
an update or a training forward that the ended one has not will not end before that is complete,
and it cannot be. The ended rank asks again and again, by a wish for a save that nobody makes:

    roll call by rank 1 after 7 forwards

All ranks agree on a step for it, which is later than the own one when another has begun an update
since; and each rank that rests at the step tells how far it is, in place of saving.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from spotspeed.checkpoint.agreement import Exchange, impatient
from spotspeed.coordinator.coordinator import Coordinator, Cut
from spotspeed.coordinator.listener import ROLL_CALL
from spotspeed.errors import CaptureError, CoordinationError
from spotspeed.exit import UnknownExit, has_failed
from spotspeed.state.boundary import forwards_of

ASK_S = 0.3
"""Between the first questions; later ones come ever more seldom."""
SLOWEST_ASK_S = 2.0
PAST_S = 0.2
"""A rank that is past for longer is believed: a last forward, of rank 0 alone, is over soon."""
STUCK_S = 10.0
"""So long inside one call of its engine a rank waits for another that is not past."""
EXIT_PATIENCE_S = 0.5
"""How long a rank whose script has failed by sys.exit waits for the others to end as well."""
DOUBTFUL_STUCK_S = 0.6
"""The same where this rank may have ended with an error."""
_SOURCE = re.compile(rf"{ROLL_CALL} by rank (\d+) after (\d+) forwards")
_CALLS = frozenset({"train_batch", "forward", "backward", "step"})
_ENGINES = ("deepspeed", "autograd")


class RollCall:
    """The side of the rank that trains `engine`.

    `agreed`, `answer` and `settled` are called on the control thread, and return at once.
    """

    def __init__(self, engine: Any, rank: int, coordinator: Coordinator) -> None:
        self.why = ""
        """Why this rank ends alone, once it does."""
        self.is_updating = False
        """An update has begun and has not ended."""
        self._engine, self._rank, self._coordinator = engine, rank, coordinator
        self._stop_step = -1
        self._is_ending = False
        self._first_seen: dict[str, float] = {}
        self._past_s, self._stuck_s = PAST_S, STUCK_S
        self._decided = threading.Event()

    def waiting(self, error: BaseException | None) -> Exchange:
        """The ranks' exchange, which is deserted when the others go on; `error` ended the script.

        By `sys.exit` and a code that is not 0 it failed, perhaps here alone: then not for long.
        """
        exchange: Exchange = self._coordinator.exchange
        if isinstance(error, SystemExit) and has_failed(error):
            exchange = impatient(self._coordinator.exchange, EXIT_PATIENCE_S)

        def call(label: str, value: bytes) -> list[bytes]:
            with self.calling(error):
                return exchange(label, value)

        return call

    @contextlib.contextmanager
    def calling(self, error: BaseException | None) -> Iterator[None]:
        """Around this rank's wait for the others to end as well.

        When they go on, the coordinator is deserted: that ends the wait with a CoordinationError,
        which is raised with what is known then.
        """
        self._is_ending = True
        self._past_s = 0.0 if has_failed(error) else PAST_S
        self._stuck_s = _stuck_s(error)
        self._decided.clear()
        source = f"{ROLL_CALL} by rank {self._rank} after {forwards_of(self._engine)} forwards"

        def call() -> None:
            wait_s = ASK_S
            self._look_at(self._stop_step)
            while not self._decided.is_set():
                self._coordinator.request_snapshot(source)
                self._decided.wait(wait_s)
                wait_s = min(SLOWEST_ASK_S, 1.2 * wait_s)
            if self.why:
                self._coordinator.desert()

        caller = threading.Thread(target=call, name="spotspeed-roll-call", daemon=True)
        caller.start()
        try:
            yield
        except CoordinationError as error:
            if self.why:
                raise CoordinationError(self.why) from error
            raise
        finally:
            self._decided.set()
            caller.join()

    def refuse_torn(self) -> None:
        """Raise CaptureError when something has ended an update in the middle: no state is left."""
        if self.is_updating:
            step = int(self._engine.global_steps) + 1
            self.why = f"update {step} has begun here and did not end: what it left is not saved"
            raise CaptureError(self.why)

    def agreed(self, cut: Cut) -> None:
        """All ranks know the step of a cut."""
        if cut.stop:
            self._stop_step = cut.step
        if self._is_ending:
            self._look_at(cut.step)

    def answer(self, source: str) -> str:
        """What keeps this rank from ending, as far as the one that asks can know; or ""."""
        found = _SOURCE.fullmatch(source)
        if found is None or self._is_ending or int(found[1]) == self._rank:
            return ""
        mine, theirs = forwards_of(self._engine), int(found[2])
        if mine > theirs:
            return f"past: {mine} forwards of the training begun, {theirs} by rank {found[1]}"
        return _stuck_in()

    def settled(self, cut: Cut, why: str) -> None:
        """A roll call is over; `why` holds an answer of some rank, if there was one."""
        found = _SOURCE.fullmatch(cut.source)
        if found is None or int(found[1]) != self._rank:
            return
        now, (who, _, answer) = time.monotonic(), why.partition(": ")
        kind = answer.partition(":")[0]
        if kind not in ("past", "stuck"):
            self._first_seen.clear()
            return
        key = who if kind == "past" else why
        for_s = now - self._first_seen.setdefault(key, now)
        if for_s >= (self._past_s if kind == "past" else self._stuck_s):
            self._conclude(why)

    def _look_at(self, step: int) -> None:
        if step > int(self._engine.global_steps):
            self._conclude(f"a rank has begun step {step}, this one has not")

    def _conclude(self, why: str) -> None:
        if not self._decided.is_set():
            self.why = f"the others go on without it: {why}"
            self._decided.set()


def _stuck_s(error: BaseException | None) -> float:
    """How long a rank has to hang to be believed: not long where this one ended with an error."""
    if has_failed(error):
        return PAST_S
    return DOUBTFUL_STUCK_S if isinstance(error, UnknownExit) else STUCK_S


def is_roll_call(cut: Cut) -> bool:
    """Whether there is nothing to save."""
    return cut.source.startswith(ROLL_CALL)


def _stuck_in() -> str:
    """Where in a call of its engine the main thread is, in words that change when it moves."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    places, is_inside = [], False
    while frame is not None:
        code = frame.f_code
        is_inside |= code.co_name in _CALLS and any(part in code.co_filename for part in _ENGINES)
        places.append(f"{code.co_name}+{frame.f_lasti}")
        frame = frame.f_back
    return f"stuck: in {' '.join(places[:8])}" if is_inside else ""
