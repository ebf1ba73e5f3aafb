"""A rank whose script has ended finds out whether the others go on without it.

A script ends on all ranks, though not at once: one may write results, or generate samples, for
minutes after the others. So a rank that ends waits for all, but not for ranks that in their turn
wait for it in a collective of the training. Nobody can tell the two apart but by where the others
are: a rank that trains on, or that hangs in a collective of a forward or backward which the ended
one has not begun, will not end before that is complete, and it cannot be. The ended rank asks again
and again, by a wish for a save that nobody makes:

    roll call by rank 1 after 7 forwards and 6 micro-steps

All ranks agree on a step for it, which is later than the own one when another has begun an update
since; and each rank that rests at the step tells how far it is, in place of saving:

    past      it has completed a micro-step of the training that the one who asks has not
    blocked   it hangs in a collective, of a forward that the one who asks has not begun
    waiting   it hangs in a collective, of a forward that both have begun
    stuck     it is inside a call of its engine, perhaps at work
    ahead     it has begun a forward more, as one that generates samples does
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from spotspeed.checkpoint.agreement import Exchange, impatient
from spotspeed.coordinator.coordinator import Coordinator, Cut
from spotspeed.coordinator.listener import ROLL_CALL
from spotspeed.errors import CaptureError, CoordinationError
from spotspeed.exit import UnknownExit, has_failed, is_of_collectives
from spotspeed.state.boundary import forwards_of

ASK_S = 0.15
"""Between the first questions; later ones come ever more seldom."""
SLOWEST_ASK_S = 2.0
PAST_S = 0.2
"""A rank that is past or blocked for longer is believed."""
WAITING_S = 0.4
"""The same for one that is waiting, where this rank has ended in the middle of a step."""
STUCK_S = 10.0
"""So long inside one call of its engine a rank waits for another that is not past."""
EXIT_PATIENCE_S = 0.5
"""How long a rank whose script has failed by sys.exit waits for the others to end as well."""
DOUBTFUL_STUCK_S = 0.6
"""The same where this rank may have ended with an error."""
_SOURCE = re.compile(rf"{ROLL_CALL} by rank (\d+) after (\d+) forwards and (\d+) micro-steps")
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
        self._forwards_at_update = 0
        self._limits_s: dict[str, float] = {}
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
        forwards, micro_steps = self._progress()
        self._limits_s = _limits_s(error, is_midway=forwards > self._forwards_at_update)
        self._decided.clear()
        source = (f"{ROLL_CALL} by rank {self._rank} after {forwards} forwards and "
                  f"{micro_steps} micro-steps")  # fmt: skip

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

    def updated(self) -> None:
        """An update is complete."""
        self.is_updating, self._forwards_at_update = False, forwards_of(self._engine)

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
        (forwards, micro_steps), theirs = self._progress(), (int(found[2]), int(found[3]))
        if micro_steps > theirs[1]:
            return f"past: {micro_steps} micro-steps trained, {theirs[1]} by rank {found[1]}"
        kind, place = where(sys._current_frames().get(threading.main_thread().ident or 0))
        if forwards <= theirs[0]:
            return f"{kind}: in {place}" if kind else ""
        kind = "blocked" if kind == "waiting" else "ahead"
        more = f"{forwards} forwards of the training begun, {theirs[0]} by rank {found[1]}"
        return f"{kind}: {more}; in {place}" if place else f"{kind}: {more}"

    def settled(self, cut: Cut, why: str) -> None:
        """A roll call is over; `why` holds an answer of some rank, if there was one."""
        found = _SOURCE.fullmatch(cut.source)
        if found is None or int(found[1]) != self._rank:
            return
        now, (who, _, answer) = time.monotonic(), why.partition(": ")
        kind = answer.partition(":")[0]
        if kind not in self._limits_s:
            self._first_seen.clear()
            return
        # What hangs does not move; one that trains on does.
        key = f"{who} {kind}" if kind in ("past", "ahead") else why
        if now - self._first_seen.setdefault(key, now) >= self._limits_s[kind]:
            self._conclude(why)

    def _progress(self) -> tuple[int, int]:
        """Forwards of the training that have begun, and micro-steps that are complete."""
        return forwards_of(self._engine), int(getattr(self._engine, "micro_steps", 0))

    def _look_at(self, step: int) -> None:
        if step > int(self._engine.global_steps):
            self._conclude(f"a rank has begun step {step}, this one has not")

    def _conclude(self, why: str) -> None:
        if not self._decided.is_set():
            self.why = f"the others go on without it: {why}"
            self._decided.set()


def _limits_s(error: BaseException | None, *, is_midway: bool) -> dict[str, float]:
    """How long each answer has to stay the same to be believed by a rank that `error` has ended.

    Not long after an error: then this rank's part of the training will not come. Nor in the middle
    of a step, whose collectives the others wait in: this rank had been in those before it.
    """
    if has_failed(error):
        return {"past": 0.0, "blocked": 0.0, "ahead": 0.0, "waiting": PAST_S, "stuck": PAST_S}
    stuck_s = DOUBTFUL_STUCK_S if isinstance(error, UnknownExit) else STUCK_S
    waiting_s = min(stuck_s, WAITING_S) if is_midway else stuck_s
    return {"past": PAST_S, "blocked": PAST_S, "waiting": waiting_s, "stuck": stuck_s}


def is_roll_call(cut: Cut) -> bool:
    """Whether there is nothing to save."""
    return cut.source.startswith(ROLL_CALL)


def where(frame: FrameType | None) -> tuple[str, str]:
    """Whether a thread that is there is waiting, stuck or neither (""), and words for the place.

    They change when the thread moves.
    """
    is_collective = frame is not None and is_of_collectives(frame.f_code.co_filename)
    places, is_inside = [], False
    while frame is not None:
        code = frame.f_code
        is_inside |= code.co_name in _CALLS and any(part in code.co_filename for part in _ENGINES)
        places.append(f"{code.co_name}+{frame.f_lasti}")
        frame = frame.f_back
    if not is_inside:
        return "", ""
    return "waiting" if is_collective else "stuck", " ".join(places[:8])
