"""The one object users hold: attach to an engine, restore, save, leave when the machine does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NoReturn

from spotspeed import dropin
from spotspeed.checkpoint.agreement import TimedExchange, share_all, share_large
from spotspeed.checkpoint.named import NamedSave
from spotspeed.checkpoint.passing import Passing
from spotspeed.checkpoint.queue import SaveHandle, SaveQueue
from spotspeed.checkpoint.register import SaveRegister
from spotspeed.checkpoint.restore import Restored, Seat, restore_agreed
from spotspeed.checkpoint.save import Seen, begin_save, see, share_of
from spotspeed.checkpoint.session import open_session
from spotspeed.checkpoint.survivors import Lost, take_seats
from spotspeed.config import SpotSpeedConfig
from spotspeed.coordinator.coordinator import GateVerdict
from spotspeed.core.manifest import Manifest, Ticket
from spotspeed.errors import ConfigError, LeavingError, SpotSpeedError
from spotspeed.exit import EXIT_NOT_DURABLE, ExitWatch, has_failed
from spotspeed.interruption import Interruption
from spotspeed.progress import Progress
from spotspeed.roll_call import RollCall
from spotspeed.state import boundary, loader_guard
from spotspeed.state.engine import Engine, rank_of, run_loader, world_size_of
from spotspeed.state.late import LateState, Source, Stateful
from spotspeed.state.loader import engine_batches
from spotspeed.state.mesh import Gather, alone, is_divided
from spotspeed.state.provider import provider_for
from spotspeed.state.small import SmallState
from spotspeed.storage.contract import Storage

CLOSE_TIMEOUT_S = 1800.0
"""Longest time that close() waits for the other ranks and for the last bytes."""


class Checkpointer:
    """Checkpoints one engine: periodic saves, saves on notice, restore on any number of ranks.

    Made by `attach`. All public methods belong to the main thread.
    """

    def __init__(self, engine: Engine, config: SpotSpeedConfig, loader: Any = None, *,
                 state: Mapping[str, Stateful] | None = None, is_implicit: bool = False,
                 number: int = 0) -> None:  # fmt: skip
        """`is_implicit`: nobody attached it, so nothing is saved that was not asked for."""
        self.engine, self.loader = engine, loader
        self.rank, self.world_size = rank_of(engine), world_size_of(engine)
        self.progress, self._is_closed = Progress(), False
        self.is_implicit, self._save_began = is_implicit, time.monotonic()
        late = LateState(state)
        if not is_divided(engine):  # What one rank refuses alone, before anything is opened.
            self._describe_by(late)
        self._cuts = Interruption(self, config, self.rank)
        session = self._session = open_session(config, self.rank, self.world_size,
                                               listener=self._cuts, number=number)  # fmt: skip
        self.config, self.number = session.config, session.number
        self.progress.may_differ = session.may_differ
        self.storage = self.origin = session.storage  # A rehearsal's origin is elsewhere.
        self.exchange: TimedExchange = session.coordinator.exchange
        with ExitStack() as opened:
            opened.callback(session.close, is_done=True, is_awaited=False)
            if is_divided(engine):
                self._describe_by(late, partial(share_large, self.exchange, "mesh"))
            self._listen(opened)
            opened.pop_all()

    def _describe_by(self, late: LateState, gather: Gather = alone) -> None:
        self._provider = provider_for(self.engine, gather)
        self._small = SmallState(self.engine, self._provider.group_names, late=late)
        self.hurry = self._small.late.hurry

    def _listen(self, opened: ExitStack) -> None:
        """Hear from the engine from here on; `opened` is closed where that fails."""
        engine, step = self.engine, int(self.engine.global_steps)
        self.passing = Passing(self.storage, self._session.epoch, exchange=self.exchange,
                               forwards=partial(boundary.forwards_of, engine))  # fmt: skip
        self._saves = SaveQueue(self._describe, self._begin, self._small.late.await_end,
                                self.passing.look)  # fmt: skip
        opened.callback(self._saves.close)
        self._register = SaveRegister(self._saves)
        self._exit = ExitWatch(self._close_at_exit)
        opened.callback(self._exit.disarm)
        self._roll_call = RollCall(engine, self.rank, self._session.coordinator)
        self._cuts.begin(self._session, self._exit, self._roll_call)
        self._binding = boundary.bind(engine, self)
        opened.callback(boundary.unbind, engine)
        self._binding.watches_forward = True
        self._small.record()
        self._session.stager.reserve(*share_of(self._provider, self._small, step))
        self._cuts.announce(self.world_size, self._provider.name, step)

    # What users call.

    def restore(self, tag: str | None = None) -> Restored | None:
        """Fill the engine from the newest durable checkpoint, whatever number of ranks wrote it.

        None on a fresh start; every rank returns or raises the same: an older one is taken when
        the newest does not verify (CorruptionError when none does); ReshardError: another model.
        """
        progress = self.progress
        if progress.is_started and (self._binding.forwards or not progress.is_prepared):
            raise ConfigError("restore() must come before the first step")
        if progress.is_started:  # `spotspeed.run` has restored it, but for what came with `attach`.
            is_done = tag is None and not self._small.late
            return progress.restored if is_done else self.load(self.origin, self.seat, tag)
        try:
            seat = self._cuts.announcing(progress.watching(self.seat), self._saves)
            restored = restore_agreed(self.origin, seat, tag=tag)
        except LeavingError:
            self._leave("before the first step")
        except SpotSpeedError:
            # What is in the engine now is no state of the run: nothing of it may be saved.
            progress.is_changed = any(share_all(self.exchange, "changed", progress.is_changed))
            self._detach()
            raise
        progress.take(restored if self.origin is self.storage else None)
        self._session.record_restored(progress.restored)
        self._start()
        return restored

    def batches(self, *, epochs: int | None = 1) -> Iterator[Any]:
        """Micro-batches of the loader given to `attach`, from where the training stands.

        Every sample of an epoch comes exactly once, across any sequence of interruptions and
        numbers of ranks: the order is that of one global stream, shuffled as the loader is, from
        whose beginning `epochs` counts (None: without end). Workers survive the notice signals.
        Raises ConfigError when the loader's order cannot be continued, and after a load of another
        state, where a new call goes on from.
        """
        if self.loader is None:
            raise ConfigError("batches() needs the loader: spotspeed.attach(engine, loader=loader)")
        self._start()
        yield from engine_batches(self.engine, self.loader, self._small, epochs=epochs,
                                  signals=self.config.notice.signals)  # fmt: skip

    def save(self, tag: str | None = None) -> SaveHandle:
        """Save the last completed step; call it on every rank. Returns before bytes are copied."""
        self._start()
        self._small.end_step()
        step = int(self.engine.global_steps)
        handle = self.submit(step, f"x{tag or step}", tag or f"step-{step}", "explicit")
        self._saves.hold(handle, self.config.staging)
        return handle

    def save_named(
        self, named: NamedSave, finish: Callable[[Manifest], Manifest] | None = None
    ) -> SaveHandle:
        """Save the state as it is now; every rank calls it, in the same order.

        `finish` runs when it is sealed, and before the handle's `upload_completion` resolves.
        """
        self._start()
        step = int(self.engine.global_steps)
        if self.engine.micro_steps % self.engine.gradient_accumulation_steps() == 0:
            self._small.record()
        self._small.end_step()
        handle = self.submit(step, self._register.name(step, named), named.tag, "explicit")
        self._saves.hold(handle, self.config.staging)
        return handle if finish is None else self._register.then(handle, finish)

    def load(
        self, storage: Storage, seat: Seat, name: str | None, digest: str | None = None
    ) -> Restored | None:
        """As `restore`, at any time between two steps; saves in flight are finished first.

        `name` is a tag or directory in `storage`, whose manifest has `digest`; `seat` is this one
        or asks for less. After an error the state is what it was or, where a rank had begun to
        replace it, lost: then only another load is possible.
        """
        progress = self._hold_saves()
        try:
            restored = restore_agreed(storage, progress.watching(seat), tag=name, digest=digest)
        except SpotSpeedError as error:
            progress.fail(error)
            progress.is_changed = any(share_all(self.exchange, "changed", progress.is_changed))
            self._cuts.is_changing = not progress.go_back(error)
            raise
        progress.lost = "" if seat.is_whole else progress.lost
        self._begin_branch()
        if restored is not None and seat.is_whole and storage.url == self.storage.url:
            progress.take(restored)
            self._session.record_restored(restored)
        self._start()
        return restored

    def load_elsewhere(self, loader: boundary.Loader) -> Any:
        """What DeepSpeed's `loader` returns or raises; if it changed the state, a branch begins."""
        progress = self._hold_saves()
        outcome, has_changed = run_loader(self.engine, loader)
        if any(share_all(self.exchange, "loaded-elsewhere", has_changed)):
            progress.lost = ""
            self._begin_branch()
        else:
            self._cuts.is_changing = not progress.go_back()
        return outcome.result()

    def _hold_saves(self) -> Progress:
        """Finish the saves in flight, and capture nothing from here on."""
        with self._cuts.lock:
            self._cuts.is_changing = True
            self.progress.set_aside()
        self.settle()
        return self.progress

    def settle(self) -> None:
        """Wait, on every rank, until each save is durable, with its marker, or has failed."""
        self._small.end_step()
        self._saves.close_window(CLOSE_TIMEOUT_S)
        self._register.settle(self.exchange, CLOSE_TIMEOUT_S)

    def _begin_branch(self) -> None:
        """Another state follows, to which no saved one leads so far."""
        self._register.forget()
        if self.progress.is_started:
            self._session.begin_epoch()
        self.progress.begin_branch()
        self._binding.watches_forward = True

    @property
    def seat(self) -> Seat:
        return self._session.seat(self.world_size, self._provider, self._small)

    def end_step(self) -> None:
        """All of the last step is done, as the next forward, a save or close() say it anyway."""
        self._small.end_step()

    def add_late(self, name: str, source: Source) -> None:
        """Record one more kind of late state from now on (state/late.py); for integrations."""
        self._small.late.add(name, source)
        self._binding.watches_forward = True

    def request_save(self) -> None:
        """Ask all ranks to save the same step, soon; from any rank and any thread."""
        self._save_began = time.monotonic()
        self._session.coordinator.request_snapshot()

    def close(self) -> None:
        """Save what is newer than the last save, wait until all is durable, and detach.

        Call it on every rank; a process that ends without an error calls it by itself. Raises
        what went wrong: StorageError when the last state could not be made durable.
        """
        error = sys.exc_info()[1]  # As in the `finally` of a script that has failed.
        if not self._is_closed and self._cuts.is_of_a_loss(error):
            self._leave("after an error")
        self._close(error)

    def _close(self, error: BaseException | None) -> None:
        if self._is_closed:
            return
        is_awaited = False
        try:
            self._roll_call.refuse_torn()
            if not self.progress.lost:
                self._start()
            elif not self.progress.is_started:
                return
            self._small.end_step()
            step = int(self.engine.global_steps)
            exchange, standing = self._roll_call.waiting(error), self.progress.standing()
            has_no_own = self.is_implicit or bool(self.progress.lost)
            is_kept = has_no_own or self._register.has_everywhere(exchange, step, standing)
            last = None if is_kept else self.submit(step, "final", f"step-{step}", "final")
            self._register.settle(exchange, CLOSE_TIMEOUT_S)
            is_awaited = True
            if last is not None:
                last.wait(CLOSE_TIMEOUT_S)
            if self._session.coordinator.close(CLOSE_TIMEOUT_S) is GateVerdict.LEAVE:
                self._leave("while closing")
            self._session.has_ended = not has_failed(error)
        except LeavingError:
            self._leave("while closing")
        finally:
            self._detach(is_awaited=is_awaited)

    # Hooks of the engine, on the main thread.

    def before_forward(self, engine: Any) -> None:
        """The first step begins, or one whose predecessor ends here."""
        self._start()
        self._small.end_step()
        self._saves.hold(None, self.config.staging)
        loader_guard.release()
        self._binding.watches_forward = False

    def on_save(self, engine: Any, arguments: Mapping[str, Any]) -> Any:
        """`engine.save_checkpoint`: saved here, with a marker where the caller wants it."""
        return boundary.PASS if self.is_implicit else dropin.save(self, arguments)

    def on_load(self, engine: Any, arguments: Mapping[str, Any], original: boundary.Loader) -> Any:
        """`engine.load_checkpoint`: what a marker names, else DeepSpeed's own files."""
        return dropin.load(self, arguments, original)

    def before_update(self, engine: Any) -> None:
        """The next update begins only when nothing of the last step is still to be copied."""
        self._start()
        if self._small.late and self._binding.watches_forward:
            self._small.end_step()  # A pipeline's step has no forward of its own.
        self._saves.open_gate(self.config.staging.max_hold_s, int(engine.global_steps))
        if self._session.coordinator.gate(int(engine.global_steps) + 1) is GateVerdict.LEAVE:
            self._leave("at the gate of the next step")
        self._roll_call.is_updating = True
        self._saves.close_window(self.config.staging.max_hold_s)  # captured at the gate: now staged

    def after_update(self, engine: Any) -> None:
        """A step is complete: keep what the next forward changes, and save if it is time."""
        self._roll_call.updated()
        self._cuts.planner.stepped()
        step = int(engine.global_steps)
        self._small.record()
        self._binding.watches_forward = bool(self._small.late)
        if self.is_on_grid(step):
            handle = self.submit(step, "p", f"step-{step}", "periodic")
            self._saves.hold(handle, self.config.staging, has_ended=not self._small.late)
        elif self.rank == 0 and self.config.interval.is_due(time.monotonic() - self._save_began):
            self.request_save()
        self._session.coordinator.completed(step)

    def on_destroy(self, engine: Any) -> None:
        """The engine goes away: nothing may be read from it any more."""
        self.close()

    # What cuts are saved with; any thread may call it.

    def is_on_grid(self, step: int) -> bool:
        """Whether every rank saves at this step of its own accord."""
        return self.progress.is_on_grid(step, self.config.interval.steps)

    def submit(self, step: int, attempt: str, tag: str, reason: str, lost: Lost = ()) -> SaveHandle:
        """The save of `step` named `attempt`: a new one, or the one that already has this name."""
        where = (tag, reason, self.world_size - len(lost), int(time.time()), self.progress.origin)
        ticket = Ticket(self._session.epoch, step, attempt, *where)
        handle, is_new = self._register.submit(ticket, lost=lost)
        if is_new:
            self._save_began = time.monotonic()
            self._cuts.follow(handle)
        return handle

    def again(self, handle: SaveHandle) -> SaveHandle:
        """A failed save once more, of a state that has not changed since."""
        fresh, is_new = self._register.submit(handle.ticket, again=True)
        if is_new:
            self._cuts.follow(fresh)
        return fresh

    def _start(self) -> None:
        self.progress.require_state()
        if not self.progress.is_started:
            self.progress.is_started = True
            if not self.progress.has_restored:
                self._session.record_restored(None)
            self._small.record()
            self._session.coordinator.start(int(self.engine.global_steps))
            self._cuts.is_changing = False

    def _describe(self, handle: SaveHandle) -> Seen:
        """Look at the tensors of one save, on the queue's thread."""
        named = self._register.named(handle)
        return see(handle.ticket, named, self._provider, self._small, self._session.stager)

    def _begin(self, handle: SaveHandle, seen: Seen) -> Any:
        """Stage one save, on the queue's thread."""
        sources = (seen, self._small, self._session.stager)
        seats = take_seats(self, handle.ticket, self._register.lost(handle))
        return begin_save(handle.ticket, seats=seats, sources=sources,
                          orders=self._cuts.orders(handle))  # fmt: skip

    def _leave(self, where: str) -> NoReturn:
        """End the thread that trains, or the one that closes after it; then the process ends."""
        code = self._cuts.exit_code
        self._cuts.say_goodbye(where)
        self._detach(is_awaited=code != EXIT_NOT_DURABLE)
        self._exit.hasten(code)
        raise SystemExit(code)

    def _close_at_exit(self, error: BaseException | None) -> None:
        """The process ends and nobody has called close()."""
        if not has_failed(error) or (isinstance(error, SystemExit) and self.progress.is_started):
            with self._cuts.deserting(error):
                return self._close(error)
        if self._cuts.is_of_a_loss(error):
            self._cuts.leave("after an error")
        self._detach(is_awaited=False)

    def _detach(self, *, is_awaited: bool = True) -> None:
        if not self._is_closed:
            self._is_closed = True
            boundary.unbind(self.engine)
            loader_guard.release()
            self._small.late.close()
            self._saves.close()
            self._session.close(is_done=not self._saves.unfinished(), is_awaited=is_awaited)
            self._exit.disarm()
