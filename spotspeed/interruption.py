"""This rank's part in the cuts of its job: save what they fix, know how they ended, leave."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

from spotspeed import events
from spotspeed.checkpoint.queue import SaveHandle, SaveQueue
from spotspeed.checkpoint.restore import Seat
from spotspeed.checkpoint.session import Session
from spotspeed.checkpoint.survivors import Lost
from spotspeed.config import SpotSpeedConfig
from spotspeed.coordinator.coordinator import Cut
from spotspeed.core.deadline import Orders
from spotspeed.core.manifest import Manifest
from spotspeed.errors import CaptureError, CoordinationError, StorageError
from spotspeed.exit import (
    EXIT_NOT_DURABLE,
    LOSS_ERRORS,
    ExitWatch,
    UnknownExit,
    has_failed,
    leave_now,
)
from spotspeed.planning import Planner, launcher_grace_s, pod_grace_s
from spotspeed.progress import Progress
from spotspeed.roll_call import RollCall, is_roll_call
from spotspeed.staging.staged import StagingFacts
from spotspeed.supervised import tell

RETRY_PAUSE_S = 0.5
"""Between two attempts of this rank to save the last step."""
LAST_WORDS_S = 2.0
"""How long a process may take to end once its last cut is settled and no time is left."""
COPY_TIMEOUT_S = 1800.0
"""Longest time that a restore waits for a copy of what it replaces."""
LAUNCHER = "the launcher's SIGKILL"
"""What ends a rank some time after its launcher's SIGTERM."""
LOST_PART_S = 3.0
"""How much longer than this rank's own part that of a lost rank may take to become durable."""


class Saves(Protocol):
    """What the checkpointer saves with; any thread may ask."""

    def submit(self, step: int, attempt: str, tag: str, reason: str, lost: Lost = ()) -> SaveHandle:
        """The save of that name: a new one, or the one that has it already.

        Where ranks are lost, the others write what replicas of it still hold.
        """
        ...

    def again(self, handle: SaveHandle) -> SaveHandle:
        """A failed save once more, under its name, of a state that has not changed since."""
        ...

    def is_on_grid(self, step: int) -> bool:
        """Whether every rank saves at this step of its own accord."""
        ...

    def hurry(self, grace_s: float) -> None:
        """There are `grace_s` seconds to wait for what a save still lacks."""
        ...

    @property
    def progress(self) -> Progress:
        """What state the engine is in."""
        ...


class Interruption:
    """Listens to the coordinator, on its control thread: every method returns at once."""

    def __init__(self, saves: Saves, config: SpotSpeedConfig, rank: int) -> None:
        self.outcome: tuple[Cut, str | None, str] | None = None
        """The last stop: what was agreed, the sealed digest or None, and why not."""
        self.is_changing = False
        """The state is being replaced: there is nothing to capture."""
        self.fresh_step: int | None = None
        """The step that the engine was attached at."""
        self.lock = threading.Lock()
        self._saves, self._config, self._rank = saves, config, rank
        self._session: Session | None = None
        self._exit: ExitWatch | None = None
        self._roll_call: RollCall | None = None
        self.planner = Planner(config, rank, launcher_s=launcher_grace_s(os.environ),
                               pod_s=pod_grace_s(os.environ))  # fmt: skip
        self._orders: Orders | None = None
        self._captures: dict[int, SaveHandle] = {}
        self._early: list[Cut] = []
        self._lost: list[int] = []

    def begin(self, session: Session, exit_watch: ExitWatch, roll_call: RollCall) -> None:
        """From here on there is something to save."""
        self._session, self._exit, self._roll_call = session, exit_watch, roll_call
        poll_s = max((source.period_s for source in session.sources), default=0.0)
        self.planner.begin(session.storage.url, poll_s=poll_s)

    def announce(self, world_size: int, provider: str, step: int) -> None:
        """Tell whoever listens that this rank is protected from here on, at `step`."""
        assert self._session is not None
        with self.lock:
            self.fresh_step, early = step, self._early
        for cut in early:
            self.on_capture(cut)
        self.planner.estimate(self._session.storage, self._session.stager.share_bytes)
        url, epoch = self._session.storage.url, self._session.epoch
        events.emit(events.Attached(url, epoch, self._rank, world_size, provider))
        tell(attached=self._rank, epoch=epoch, path=url, deadline_s=self._config.notice.deadline_s)

    def announcing(self, seat: Seat, saves: SaveQueue) -> Seat:
        """`seat` of a restore, before which what was there at the start is copied, or never is."""

        def begin() -> None:
            with self.lock:
                self.is_changing = True
            saves.close_window(COPY_TIMEOUT_S)
            seat.on_change()

        return replace(seat, on_change=begin)

    def follow(self, handle: SaveHandle) -> None:
        """A save has been asked for: learn what it takes, and collect what it makes old."""
        assert self._session is not None
        self.planner.follow(handle)
        handle.upload_completion.add_done_callback(self._session.collect)

    def orders(self, handle: SaveHandle) -> Orders | None:
        """How a save is to be stored; None: as the config has it."""
        return self._orders if handle.ticket.reason == "notice" else None

    @property
    def exit_code(self) -> int:
        """What the process ends with, as far as is known."""
        is_durable = self.outcome is not None and self.outcome[1] is not None
        return self._config.on_interrupt.exit_code if is_durable else EXIT_NOT_DURABLE

    def say_goodbye(self, where: str) -> None:
        """One line for people: what is durable, and how this rank leaves.

        From then on the main thread hears no notice any more.
        """
        assert self._session is not None
        if threading.current_thread() is threading.main_thread():
            for name in self._config.notice.signals:
                signal.signal(signal.Signals[name], signal.SIG_IGN)
        text = self._session.farewell(self.outcome, where)
        sys.stderr.write(f"spotspeed: rank {self._rank}: {text}; leaving with {self.exit_code}\n")
        sys.stderr.flush()

    @contextlib.contextmanager
    def deserting(self, error: BaseException | None) -> Iterator[None]:
        """Around the close of a rank that may be the only one to end: that is told, not raised."""
        try:
            yield
        except (CoordinationError, CaptureError) as alone:
            assert self._exit is not None and self._roll_call is not None
            if not has_failed(error) and not self._roll_call.why:
                raise
            events.emit(events.Lost(f"rank {self._rank}, whose script has ended,", str(alone)))
            is_silent = isinstance(alone, CaptureError) or not isinstance(error, UnknownExit)
            if is_silent and not has_failed(error):
                self._exit.expect(EXIT_NOT_DURABLE)

    def is_of_a_loss(self, error: BaseException | None) -> bool:
        """Whether an error that has come to this rank is the end of another, and all leave."""
        assert self._session is not None
        timeout_s = self._config.coordinator.peer_timeout_s
        is_alike = isinstance(error, LOSS_ERRORS)
        return is_alike and self._session.coordinator.await_departure(timeout_s)

    # What the coordinator calls.

    def on_notice(self, source: str, seconds_left: float) -> None:
        """A notice was heard on this rank."""
        if source == LAUNCHER:
            return
        self.planner.heard()
        events.emit(events.Noticed(source, self._rank, seconds_left))
        kill_s = self.planner.kill_s
        if source == "SIGTERM" and kill_s is not None and self._session is not None:
            # The round ends by then: whoever is killed says nothing more.
            self._session.coordinator.notice(LAUNCHER, min(kill_s, seconds_left))

    def on_agreed(self, cut: Cut) -> None:
        """All ranks know the step of a cut."""
        if self._roll_call is not None:
            self._roll_call.agreed(cut)

    def on_capture(self, cut: Cut) -> None:
        """State at `cut.step` is constant until the gate opens: save it, or join its save."""
        with self.lock:
            if self.fresh_step is None:
                self._early.append(cut)  # For when this rank is attached.
                return
        assert self._session is not None and self._roll_call is not None
        coordinator = self._session.coordinator
        if is_roll_call(cut):
            answer = self._roll_call.answer(cut.source)
            if answer:
                return coordinator.report_failed(cut.round, answer)
            return coordinator.report_durable(cut.round, None)
        standing = self._session.standing if cut.step < 0 else self._saves.progress.standing()
        if standing is not None and cut.step in (standing.step, -1):
            return coordinator.report_durable(cut.round, standing.digest)
        if cut.step < 0:
            # No checkpoint is there that a restore could bring back: this is where the run begins.
            cut = replace(cut, step=self.fresh_step)
        if cut.stop and cut.round not in self._captures:
            left_s = cut.seconds_left
            left_s = self._config.notice.deadline_s if left_s is None else left_s
            plan = self.planner.plan(cut.step, cut.source, left_s, self._session.known_tag())
            self._orders = plan.orders
            self._saves.hurry(plan.patience_s)
        attempt, reason = cut.attempt, "notice" if cut.stop else "periodic"
        if self._saves.is_on_grid(cut.step) and not cut.lost:
            attempt, reason = "p", "periodic"
        with self.lock:
            if self.is_changing:
                handle = None
            elif (handle := self._captures.get(cut.round)) is None:
                tag = f"step-{cut.step}"
                handle = self._saves.submit(cut.step, attempt, tag, reason, cut.lost)
                self._captures[cut.round] = handle
        if handle is None:
            return coordinator.report_failed(cut.round, "the state is being replaced by a load")
        self._follow(cut, handle, time.monotonic())

    def on_outcome(self, cut: Cut, digest: str | None, why: str) -> None:
        """All ranks know how the cut ended; a copy that is not staged by now is not wanted."""
        if self._roll_call is not None:
            self._roll_call.settled(cut, why)
        with self.lock:
            handle = self._captures.pop(cut.round, None)
            self._early = [early for early in self._early if early.round != cut.round]
        if digest is None and handle is not None and not handle.staging_completion.done():
            handle.abandon(why)
        if digest is None and handle is not None and handle.level == "node":
            why += "; this rank's part is durable on its node only, and drained from there"
        if cut.stop:
            cut = cut if handle is None else replace(cut, step=handle.step)
            self.outcome = (cut, digest, why)
            if self._exit is not None:
                self._exit.expect(self.exit_code)
                self._exit.within(max(LAST_WORDS_S, cut.seconds_left or 0.0), self.exit_code)

    def on_peer_lost(self, rank: int, why: str) -> None:
        """A rank is gone."""
        events.emit(events.Lost(f"rank {rank}", why))
        with self.lock:
            self._lost.append(rank)
            handles = list(self._captures.items())
        for number, handle in handles:
            self._doubt(number, handle, time.monotonic())

    def leave(self, why: str) -> None:
        """End the process at once: the main thread does not get to the gate in time."""
        if self._session is None or self._exit is None:
            text = f"interrupted while it was being attached ({why})"
            sys.stderr.write(f"spotspeed: rank {self._rank}: {text}; leaving with 76\n")
            return leave_now(EXIT_NOT_DURABLE)
        self.say_goodbye(why)
        self._exit.now(self.exit_code)

    # Inside.

    def _follow(self, cut: Cut, handle: SaveHandle, began: float) -> None:
        """Tell the agreement how far the save is, and how it ends."""
        assert self._session is not None
        coordinator = self._session.coordinator

        def staged(future: Future[StagingFacts]) -> None:
            if future.exception() is None:
                coordinator.report_staged(cut.round)

        def durable(future: Future[Manifest]) -> None:
            error = future.exception()
            if error is None:
                coordinator.report_durable(cut.round, future.result().digest)
            elif not self._try_again(cut, handle, began, error):
                coordinator.report_failed(cut.round, str(error))

        handle.staging_completion.add_done_callback(staged)
        handle.upload_completion.add_done_callback(durable)
        if set(self._lost) - set(cut.lost):
            self._doubt(cut.round, handle, began)

    def _try_again(self, cut: Cut, handle: SaveHandle, began: float, error: BaseException) -> bool:
        """Whether the last step, which stays as it is, will be saved once more.

        So it is while time is left and nobody is lost: a store may recover, and the next attempt
        starts another saver where one has died.
        """
        left_s = began + (cut.seconds_left or 0.0) - time.monotonic()
        is_hopeful = cut.stop and not self._lost and isinstance(error, StorageError)
        if not is_hopeful or left_s <= RETRY_PAUSE_S:
            return False

        def retry() -> None:
            with self.lock:
                if self._captures.get(cut.round) is not handle or self.is_changing:
                    return
                fresh = self._captures[cut.round] = self._saves.again(handle)
            self._follow(cut, fresh, began)

        timer = threading.Timer(RETRY_PAUSE_S, retry)
        timer.daemon = True
        timer.start()
        return True

    def _doubt(self, number: int, handle: SaveHandle, began: float) -> None:
        """A rank is lost: its saver may complete the save, or be gone with its node.

        It has had as long as this rank's own part takes, and a little more; then it is given up.
        """
        assert self._session is not None
        coordinator = self._session.coordinator

        def wait() -> None:
            if handle.stored_completion.exception() is None:
                limit_s = LOST_PART_S + time.monotonic() - began
                try:
                    handle.upload_completion.exception(limit_s)
                except TimeoutError:
                    why = f"the part of a lost rank is not there {limit_s:.1f} s after this one's"
                    coordinator.report_failed(number, why)

        threading.Thread(target=wait, name="spotspeed-doubt", daemon=True).start()
