"""Takes saves from the training and copies them, in order, into the arena of the node's saver."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from spotspeed.config import SpotSpeedConfig
from spotspeed.core.deadline import Orders
from spotspeed.core.frozen import ObjectRecord
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket
from spotspeed.core.saver_protocol import Drained, LostPart
from spotspeed.errors import SpotSpeedError, StorageError
from spotspeed.events import Reserved, emit
from spotspeed.staging.check import Window
from spotspeed.staging.client import (
    OnNotice,
    SaveListener,
    SaverSession,
    find_saver,
    open_session,
)
from spotspeed.staging.devices import ENGINES, Engines
from spotspeed.staging.frozen import FrozenShare, plan_share
from spotspeed.staging.launch import rendezvous_url
from spotspeed.staging.native import CopyEngine
from spotspeed.staging.pool import (
    available_memory_bytes,
    choose_arena_bytes,
    choose_slot_bytes,
)
from spotspeed.staging.sources import DeviceSource, Source, gather
from spotspeed.staging.staged import CopySettings, StagedSave

if TYPE_CHECKING:
    import torch

URGENT_REASONS = frozenset({"notice", "explicit", "final"})
"""Saves that are also copied by a thread of normal priority."""
BACKGROUND_NICE = 10
CLOSE_TIMEOUT_S = 5.0
RESTART_PAUSE_S = 2.0
_LOST_MAX = 16
"""Of how many lost parts each later saver is told: for the last ones somebody may still wait."""
_logger = logging.getLogger("spotspeed")


@dataclass(frozen=True, slots=True)
class Terms:
    """What is special about one save."""

    rank: int | None = None
    """The part of the ticket that it is; None: that of this rank's number."""
    orders: Orders | None = None
    """How it is to be stored; None: as the config says."""
    window: Window | None = None
    """Fails it when the tensors have changed since; None: a look at them is taken now."""
    after: Any = None
    """The torch.cuda.Event behind which its state stands; None: what is queued now."""


NO_TERMS = Terms()


class Stager:
    """One rank's way to the saver of its node for the store `url`; any thread may use it.

    The saver is started and the arena reserved by `reserve`, or else by the first save. When a
    saver dies, its saves fail, and the next one starts another.
    """

    def __init__(
        self,
        url: str,
        config: SpotSpeedConfig,
        rank: int,
        *,
        local_world_size: int = 1,
        on_notice: OnNotice | None = None,
        engines: Engines = ENGINES,
    ) -> None:
        self.url = rendezvous_url(url)
        local_path = config.local_path
        self._local_path = os.path.realpath(os.path.expanduser(local_path)) if local_path else ""
        self._config = config
        self._rank = rank
        self._local_world_size = local_world_size
        self._on_notice = on_notice
        self._share_bytes = 0
        self._session: SaverSession | None = None
        self._session_lock = threading.Lock()
        self._owner: tuple[int, float] | None = None
        self._lost: deque[LostPart] = deque(maxlen=_LOST_MAX)
        self._numbers = itertools.count(1)
        threads = copy_threads(local_world_size)
        self._lazy = CopyEngine(threads, low_priority=True)
        self._urgent = CopyEngine(threads)
        self._engines = engines
        self._device: torch.device | None = None
        self._jobs: deque[StagedSave] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._last: StagedSave | None = None
        self._unsettled: list[StagedSave] = []
        self._adopted: dict[str, ObjectRecord] = {}
        self._copier: threading.Thread | None = None

    def reserve(self, share_bytes: int, device: torch.device | None = None) -> None:
        """Start or find the saver, and reserve the arena for saves of `share_bytes` by this rank.

        State on an accelerator, `device`, is copied into page-locked memory.
        Raises PoolExhaustedError when the node has no memory for the minimum, StorageError when
        there is no saver to be had.
        """
        self._share_bytes, self._device = max(share_bytes, self._share_bytes), device
        self._open_session()

    def watch(
        self, ticket: Ticket, pieces: Sequence[tuple[Fragment, torch.Tensor]], after: Any = None
    ) -> Window:
        """Digests of `pieces` as they are now, as `staging.check` wants them; for `stage`."""
        seed = zlib.crc32(ticket.digest, self._rank)
        check = self._config.staging.check
        looked_at = pieces if check != "off" else ()
        return Window(*gather(looked_at, {}, **self._way(after)), check, seed=seed)

    @property
    def share_bytes(self) -> int:
        """What a save of this rank takes, as far as is known."""
        return self._share_bytes

    def stage(
        self,
        ticket: Ticket,
        pieces: Sequence[tuple[Fragment, torch.Tensor]],
        blobs: Mapping[TensorKey, bytes],
        *,
        frozen: Sequence[tuple[Fragment, torch.Tensor]] = (),
        terms: Terms = NO_TERMS,
    ) -> StagedSave:
        """Begin to copy a save; returns before the bytes are copied.

        `pieces` are fragments with 1-D contiguous tensors of exactly their elements, `blobs`
        become one-dimensional uint8 tensors.
        `frozen` are pieces that nothing trains: they are read now, and copied only when the last
        save did not hold the same. The tensors may not change until `StagedSave.wait_staged`.
        Those on a GPU are read once `terms.after` has come to pass, whatever was queued later.
        Raises CaptureError for a tensor that is not its fragment; all other failures come out of
        the futures.
        """
        way = self._way(terms.after)
        window = terms.window or self.watch(ticket, [*frozen, *pieces], terms.after)
        share = plan_share(frozen, self._known_objects(), **way)
        if share.is_small:
            pieces, share = [*pieces, *frozen], FrozenShare()
        fragments, sources = gather(pieces, blobs, **way)
        self._look_for_device(sources)
        part = self._rank if terms.rank is None else terms.rank
        save = StagedSave(
            ticket, part, contents=(fragments, sources), frozen=share,
            window=window,
            settings=CopySettings(
                self._session_for, lambda: next(self._numbers), self._help,
                self._lazy, self._urgent, terms.orders or Orders(self._config.compression or ""),
            ),
        )  # fmt: skip
        self._share_bytes = max(self._share_bytes, save.size_bytes)
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the stager is closed")
            again = (ticket.directory, part)
            for lost in [lost for lost in self._lost if (lost.directory, lost.rank) == again]:
                self._lost.remove(lost)
            self._jobs.append(save)
            self._last = save
            self._unsettled = [job for job in self._unsettled if not job.is_settled] + [save]
            self._changed.notify_all()
            if self._copier is None:
                self._copier = threading.Thread(
                    target=self._copy_all, name="spotspeed-stager", daemon=True
                )
                self._copier.start()
        if ticket.reason in URGENT_REASONS:
            name = "spotspeed-stager-urgent"
            threading.Thread(target=self._help, args=(save, None), name=name, daemon=True).start()
        return save

    def is_idle(self) -> bool:
        """Whether every save of this rank is sealed or has failed, on whatever thread one asks."""
        with self._changed:
            return all(save.is_settled for save in self._unsettled)

    def in_flight(self) -> frozenset[str]:
        """The directories of the saves that are not."""
        with self._changed:
            unsettled = [save for save in self._unsettled if not save.is_settled]
            return frozenset(save.ticket.directory for save in unsettled)

    def adopt(self, objects: Iterable[ObjectRecord]) -> None:
        """The training goes on from a checkpoint with these frozen objects, all of them verified.

        The next save may refer to them, and to no other.
        """
        with self._changed:
            self._last, self._adopted = None, {item.content: item for item in objects}

    def _known_objects(self) -> dict[str, ObjectRecord]:
        with self._changed:
            last, adopted = self._last, self._adopted
        return adopted if last is None else last.known_objects()

    def drain(
        self,
        before_epoch: int,
        *,
        timeout_s: float,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Drained | None:
        """Wait until what an older launch left on this node, in a saver or on disk, is written.

        Covers saves of epochs below `before_epoch`; None when there is nothing of the kind. With a
        tier on the node's disk a saver is started to drain what lies there. Raises
        StorageError after `timeout_s`; `on_progress(saves_left, bytes_left)` is called meanwhile.
        """
        if self._local_path:
            session: SaverSession | None = open_session(
                self.url, rank=self._rank, arena_bytes=0, slot_bytes=0
            )
        else:
            session = find_saver(self.url)
        if session is None:
            return None
        with contextlib.closing(session):
            if self._local_path:
                session.use_tier(self._local_path)
            return session.drain(before_epoch, timeout_s=timeout_s, on_progress=on_progress)

    def renew_owner(self, epoch: int, *, period_s: float) -> None:
        """Let the saver renew the owner record of `epoch` while this rank or its saves live.

        Begins with the session, that is after `reserve` or the first save.
        """
        with self._session_lock:
            self._owner = (epoch, period_s)
            if self._session is not None and self._session.is_alive:
                self._session.renew_owner(epoch, period_s=period_s)

    def close(self, *, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Stop; saves already staged are finished by the saver, whose answers are awaited.

        Waits up to `timeout_s` for them. Idempotent.
        """
        with self._changed:
            self._is_closed = True
            jobs = list(self._jobs)
            self._changed.notify_all()
        for job in jobs:
            if not job.staging_completion.done():
                job.abandon("the stager was closed before it was staged")
        with self._session_lock:
            session, self._session = self._session, None
        if session is not None:
            session.close(timeout_s=timeout_s)

    def _session_for(self, may_start: bool) -> SaverSession | None:
        """The session for a save; None where none is open and this thread cannot wait for one."""
        if may_start:
            return self._open_session()
        session = self._session
        return session if session is not None and session.is_alive else None

    def _open_session(self) -> SaverSession:
        with self._session_lock:
            if self._session is not None and self._session.is_alive:
                return self._session
            if self._is_closed:
                raise StorageError("the saver is gone, and so soon will be this rank")
            memory_gb = self._config.staging.host_memory_gb
            arena_bytes, reason = choose_arena_bytes(
                self._share_bytes,
                host_memory_bytes=None if memory_gb is None else int(memory_gb * 1e9),
                available_bytes=available_memory_bytes(),
                local_world_size=self._local_world_size,
            )
            self._session = open_session(
                self.url, rank=self._rank, arena_bytes=arena_bytes,
                slot_bytes=choose_slot_bytes(self._share_bytes), on_notice=self._on_notice,
            )  # fmt: skip
            emit(Reserved(self._rank, arena_bytes, self._share_bytes, reason))
            if self._local_path:
                self._session.use_tier(self._local_path)
            self._pin(self._session)
            if self._owner is not None:
                self._session.renew_owner(self._owner[0], period_s=self._owner[1])
            with self._changed:
                lost = list(self._lost)
            for part in lost:
                self._session.send(part)
            self._session.when_lost(self._replace_saver)
            return self._session

    def _replace_saver(self, failed: Sequence[SaveListener]) -> None:
        """The saver is gone, and the saves that it had of this rank have failed.

        Another is started at once where somebody needs it: the path's owner must stay known as
        alive, and ranks of this node that give their part to the next saver must not wait for one
        that is lost. Else the next save does it.
        """
        parts = [
            LostPart(save.ticket.directory, save.rank, "its saver died before it was stored")
            for save in failed
            if isinstance(save, StagedSave) and not save.is_stored
        ]
        with self._changed:
            self._lost += parts
        if (self._owner is not None or self._lost) and not self._is_closed:
            name = "spotspeed-saver-restart"
            threading.Thread(target=self._keep_trying, name=name, daemon=True).start()

    def _keep_trying(self) -> None:
        """Body of a thread: have a saver, unless this stager is closed."""
        while not self._is_closed:
            try:
                self._open_session()
                return
            except SpotSpeedError as error:
                _logger.warning("there is no saver for now: %s", error)
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed, RESTART_PAUSE_S)

    def _way(self, after: Any) -> dict[str, Any]:
        return {"engines": self._engines, "after": after}

    def _look_for_device(self, sources: Sequence[Source]) -> None:
        """State has come onto an accelerator since `reserve`: the arena is locked before it goes.

        Here and not where the session is taken up, because that may be the thread that trains.
        """
        if self._device is not None:
            return
        on_device = (source for source in sources if isinstance(source, DeviceSource))
        self._device = next((source.tensor.device for source in on_device), None)
        with self._session_lock:
            if self._session is not None and self._session.is_alive:
                self._pin(self._session)

    def _pin(self, session: SaverSession) -> None:
        if self._device is not None:
            session.arena.pin(partial(self._engines.lock, self._device))

    def _copy_all(self) -> None:
        """Body of the background thread: copy the saves in order, at low priority."""
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND_NICE)
        while (job := self._first()) is not None:
            job.copy(None, is_urgent=False)
            with self._changed:
                if self._jobs and self._jobs[0] is job:
                    self._jobs.popleft()

    def _first(self) -> StagedSave | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closed)
            return self._jobs[0] if self._jobs else None

    def _help(self, save: StagedSave, deadline: float | None) -> None:
        """Copy on the calling thread what comes before `save`, and `save` itself."""
        with self._changed:
            jobs = list(self._jobs)
        for job in jobs if save in jobs else ():
            if deadline is not None and time.monotonic() >= deadline:
                return
            job.copy(deadline, is_urgent=True)
            if job is save:
                return


def copy_threads(local_world_size: int) -> int:
    """Copying threads of one rank, besides the stager's own: a part of its share of the cores."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(4, cores // local_world_size // 4))
