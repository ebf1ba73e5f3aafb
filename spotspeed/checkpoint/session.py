"""What one launch holds open while it trains: the store, its epoch, the saver, the coordinator."""

from __future__ import annotations

import os
import secrets
import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from spotspeed import events
from spotspeed.checkpoint import scripts
from spotspeed.checkpoint.agreement import (
    Exchange,
    all_or_none,
    raise_first,
    share,
    share_all,
    vote,
)
from spotspeed.checkpoint.catalog import describe, list_sealed, scan
from spotspeed.checkpoint.collector import Collector
from spotspeed.checkpoint.commit import roll_forward
from spotspeed.checkpoint.keep_record import KeepRecord, record_keep
from spotspeed.checkpoint.ownership import (
    RENEWAL_PERIOD_S,
    record_restored_from,
    release,
)
from spotspeed.checkpoint.processes import this_process
from spotspeed.checkpoint.restore import Restored, Seat
from spotspeed.checkpoint.tiers import check_local_path, open_node
from spotspeed.config import NoticeConfig, SpotSpeedConfig
from spotspeed.coordinator.bootstrap import connect_ranks
from spotspeed.coordinator.coordinator import Coordinator, Cut, CutListener
from spotspeed.coordinator.notice import Notice, NoticeSource, configured_sources
from spotspeed.core.manifest import MAX_STEP, Manifest
from spotspeed.core.retention import Keep, Work
from spotspeed.errors import (
    ConfigError,
    ObjectNotFoundError,
    SpotSpeedError,
    StorageError,
    TransientStorageError,
)
from spotspeed.staging.stager import Stager
from spotspeed.state.provider import StateProvider
from spotspeed.state.small import SmallState
from spotspeed.storage import open_storage
from spotspeed.storage.contract import Storage

PROBE_DIRECTORY = "probe"
_MOUNTS = "/proc/self/ns/mnt"
"""Differs between containers, each of which has files of its own."""
_open: Counter[str] = Counter()
"""How many sessions this process has at each store: several engines may share one."""
LOOK_S = 1.0
"""How long a rank that leaves looks for the newest checkpoint, to name it."""
SAVER_NEWS_S = 5.0
"""How long a rank that closes waits for what its saver still has to say."""
DRAIN_TIMEOUT_S = 600.0
"""Longest time that a launch waits for what an earlier one on this node is still writing."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A sealed checkpoint that holds exactly the state that the job stands at."""

    step: int
    digest: str


@dataclass(frozen=True, slots=True)
class _Claimed:
    """What a claim came to, the same on every rank."""

    epoch: int
    standing: Standing | None
    """The newest checkpoint at its beginning."""
    may_differ: bool


@dataclass(slots=True)
class Session:
    """One launch of the job at its path."""

    config: SpotSpeedConfig
    storage: Storage
    coordinator: Coordinator
    stager: Stager
    epoch: int
    rank: int
    number: int = 0
    """Which place of those at the block's path it has (scripts.place)."""
    has_ended: bool = False
    """Whether the training has come to its end; noted when it is closed."""
    collector: Collector | None = None
    """Rank 0's: removes what is not kept any more."""
    sources: list[NoticeSource] = field(default_factory=list)
    """Where notices other than signals come from: one rank a node watches."""
    standing: Standing | None = None
    """The newest checkpoint when this launch claimed the path; the same on every rank."""
    may_differ: bool = False
    """Whether checkpoints of another model are no sign of a mistake here: those of the last launch
    are of this very script, or all there are belong to directories of somebody's own."""
    near: Storage | None = None
    """The tier on this node's own disk, when `local_path` is set."""
    _newest: tuple[int, str] | None = None
    """Step and tag of the newest checkpoint that this rank has seen sealed."""

    def seat(self, world_size: int, provider: StateProvider, small: SmallState) -> Seat:
        """This rank's place in a restore, which reads what lies on its own node from there."""
        exchange = self.coordinator.exchange
        return Seat(self.rank, world_size, exchange, provider, small, near=self.near)

    def collect(self, sealed: Future[Manifest]) -> None:
        """A save has ended; when it is durable, older ones may go.

        Not while another engine of this process saves at the same place under an epoch of its own.
        """
        if sealed.exception() is None:
            ticket = sealed.result().ticket
            self._newest = max(self._newest or (-1, ""), (ticket.step, ticket.tag))
        is_alone = _open[self.storage.url] == 1
        if self.collector is not None and is_alone and sealed.exception() is None:
            self.collector.sealed()

    def watch(self, sources: list[NoticeSource]) -> None:
        """Begin to listen for notices from files and clouds."""
        for source in sources:
            source.start(self._on_notice)
            self.sources.append(source)

    def _on_notice(self, notice: Notice) -> None:
        self.coordinator.notice(notice.source, notice.seconds_left, stop=notice.stop)

    def newest_tag(self) -> str:
        """The newest sealed checkpoint, in words for a person; no store is awaited for long."""
        answers: list[str] = []

        def look() -> None:
            try:
                found = list_sealed(self.storage)
            except SpotSpeedError as error:
                answers.append(f"an unknown checkpoint ({error})")
            else:
                answers.append(f"{found[0].tag!r} (step {found[0].step})" if found else "the start")

        looking = threading.Thread(target=look, name="spotspeed-newest", daemon=True)
        looking.start()
        looking.join(LOOK_S)
        if answers:
            return answers[0]
        if self._newest is None:
            return "an unknown checkpoint (the store does not answer)"
        return f"{self._newest[1]!r} (step {self._newest[0]}; the store does not answer)"

    def known_tag(self) -> str:
        """The newest checkpoint that this rank knows of without asking the store, in words."""
        if self._newest is not None:
            return f"{self._newest[1]!r} (step {self._newest[0]})"
        return "the start" if self.standing is None else f"step {self.standing.step}"

    def farewell(self, outcome: tuple[Cut, str | None, str] | None, where: str) -> str:
        """How this rank ends: what the last cut came to, or where the rank was without one."""
        if outcome is not None and outcome[1] is not None:
            step = outcome[0].step
            if step < 0 and self.standing is not None:
                step = self.standing.step
            return f"interrupted, durable at step {step}"
        why = outcome[2] if outcome else where
        return f"interrupted, nothing newer than {self.newest_tag()} is known durable ({why})"

    def close(self, *, is_done: bool, is_awaited: bool = True) -> None:
        """Let go of the saver; what is staged is still written by it.

        `is_done` says that nothing is: then the next launch need not ask whether this one lives.
        Unless `is_awaited`, the others are told at once, and the saver is not asked for more news.
        """
        if not is_awaited:
            self.coordinator.close(0.0)
        for source in self.sources:
            source.stop()
        if self.collector is not None:
            self.collector.close()
        _open[self.storage.url] -= 1
        self.stager.close(timeout_s=SAVER_NEWS_S if is_awaited else 0.0)
        if self.rank == 0:
            try:
                if self.has_ended:
                    scripts.end(self.storage, self.epoch)
                if is_done:
                    release(self.storage, self.epoch)
            except StorageError as error:
                events.emit(events.Lost("the owner record could not be released", str(error)))
        self.coordinator.close(0.0)

    def begin_epoch(self) -> None:
        """Go on as the next epoch, from another checkpoint; every rank calls it."""
        answer = share(self.coordinator.exchange, "next-epoch", self.rank,
                       lambda: {"epoch": scripts.claim(self.storage)[0].epoch})  # fmt: skip
        self.epoch, self.standing = int(answer["epoch"]), None
        if self.rank == 0:
            self.stager.renew_owner(self.epoch, period_s=RENEWAL_PERIOD_S)
        if self.collector is not None:
            self.collector.begin(self.epoch)

    def record_restored(self, restored: Restored | None) -> None:
        """Write down where this epoch's lineage begins; rank 0 does it for all."""
        directory = restored.directory if restored else None
        self.stager.adopt(restored.objects if restored else ())

        def record() -> dict[str, Any]:
            record_restored_from(self.storage, self.epoch, directory)
            return {}

        share(self.coordinator.exchange, "lineage", self.rank, record)


def open_session(
    config: SpotSpeedConfig, rank: int, world_size: int, *, listener: CutListener, number: int = 0
) -> Session:
    """Connect the ranks, check that `path` is one place, and claim it for this launch.

    With a `number` the engine is one of those that a script makes at `path`, and lives at the first
    place from that one on that no earlier world of the script has done with (scripts.next_place).

    The same on every rank, or an error on every rank: ConfigError when the path is not the same
    place for all ranks, OwnedError when another living job has it.
    """
    transport = connect_ranks(config.coordinator, rank, world_size)
    coordinator = Coordinator(transport, config, listener)
    try:
        if number > 0:
            answer = share(coordinator.exchange, "place", rank,
                           lambda: {"number": scripts.next_place(absolute(config.path), number)}
                           )  # fmt: skip
            number = int(answer["number"])
            config = config.model_copy(update={"path": scripts.place(config.path, number)})
        storage = _open_everywhere(config.path, coordinator.exchange)
        probe_one_place(storage, coordinator.exchange, rank)
        near = _open_tier(config.local_path, storage, coordinator.exchange)
        places = share_all(coordinator.exchange, "host", _place())
        sources = _find_sources(config.notice, coordinator.exchange, rank, places)
        hosts = [host for host, _ in places]
        stager = Stager(storage.url, config, rank, local_world_size=hosts.count(hosts[rank]),
                        on_notice=lambda left_s, source: coordinator.notice(source, left_s or None)
                        )  # fmt: skip
        claimed = _claim(storage, coordinator.exchange, stager, rank, config)
    except BaseException:  # whatever ends this, a signal's exception too: its threads end as well
        coordinator.close(0.0)
        raise
    session = Session(config, storage, coordinator, stager, claimed.epoch, rank, number, near=near,
                      standing=claimed.standing, may_differ=claimed.may_differ)  # fmt: skip
    _open[storage.url] += 1
    if rank == 0:
        session.collector = Collector(
            storage, config.keep, epoch=claimed.epoch, is_quiet=stager.is_idle,
            work=lambda: Work(stager.in_flight(), has_tiers=near is not None),
        )  # fmt: skip
    session.watch(sources)
    return session


def _place() -> list[str]:
    """This rank's host, and its container there."""
    return [this_process().boot_id, str(os.stat(_MOUNTS).st_ino)]


def _find_sources(
    config: NoticeConfig, exchange: Exchange, rank: int, places: list[list[str]]
) -> list[NoticeSource]:
    """What this rank watches: the first one in each container of each host does, for all there.

    The ConfigError of one rank, whose environment names an endpoint that is none, on every rank.
    """
    is_first = places.index(places[rank]) == rank
    return all_or_none(exchange, "notices", lambda: configured_sources(config) if is_first else [])


def _open_everywhere(path: str, exchange: Exchange) -> Storage:
    """The store at `path`; the first rank's error on every rank when some rank cannot open it."""
    return all_or_none(exchange, "path-open", lambda: open_storage(absolute(path)))


def _open_tier(local_path: str | None, storage: Storage, exchange: Exchange) -> Storage | None:
    """The tier of this node; the first rank's ConfigError on every rank when it is not usable."""

    def check() -> None:
        if local_path is not None:
            check_local_path(local_path, storage.url)

    all_or_none(exchange, "local-path", check)
    return None if local_path is None else open_node(local_path, storage.url)


def _claim(
    storage: Storage, exchange: Exchange, stager: Stager, rank: int, config: SpotSpeedConfig
) -> _Claimed:
    """Let the saver that an older launch left here finish, then begin the next epoch.

    Saves that lack nothing but their manifest are sealed: their savers died just before.
    """

    def drain() -> None:
        drained = stager.drain(MAX_STEP, timeout_s=DRAIN_TIMEOUT_S)
        for directory in drained.failed if drained else ():
            why = "what an earlier launch left of it on this node was not completed"
            events.emit(events.Lost(directory, why))

    all_or_none(exchange, "drain", drain)

    def claim() -> dict[str, Any]:
        claimed, is_ours = scripts.claim(storage, take_over=config.take_over)
        keep = Keep(config.keep.last, config.keep.every_steps)
        record_keep(storage, claimed.epoch, KeepRecord(keep, config.local_path is not None))
        for manifest in roll_forward(storage).sealed:
            info = describe(manifest)
            events.emit(events.Sealed(info.directory, info.tag, info.step, info.size_bytes, 0.0))
        # Quietly: it is the restore that says which damaged ones it passes over.
        sealed = scan(storage).sealed
        newest = [(info.step, info.digest) for info in sealed[:1]]
        may_differ = is_ours or scripts.belong_to_directories(sealed)
        return {"epoch": claimed.epoch, "newest": newest, "may_differ": may_differ}

    answer = share(exchange, "epoch", rank, claim)
    epoch, newest = int(answer["epoch"]), answer["newest"]
    if rank == 0:
        stager.renew_owner(epoch, period_s=RENEWAL_PERIOD_S)
    standing = Standing(int(newest[0][0]), str(newest[0][1])) if newest else None
    return _Claimed(epoch, standing, bool(answer["may_differ"]))


def absolute(path: str) -> str:
    """`path` as a URL or an absolute directory; "~" is the home directory."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def probe_one_place(storage: Storage, exchange: Exchange, rank: int) -> None:
    """Check that what rank 0 writes below the path is what every other rank reads there."""
    token = secrets.token_hex(16)

    def write() -> dict[str, Any]:
        try:
            storage.put(f"{PROBE_DIRECTORY}/{token}", token.encode())
        except TransientStorageError:
            raise
        except StorageError as error:
            raise ConfigError(f"`path` {storage.url} cannot be written: {error}") from error
        return {"token": token}

    token = share(exchange, "path-probe", rank, write)["token"]
    objection: SpotSpeedError | None = None
    try:
        found = storage.get(f"{PROBE_DIRECTORY}/{token}", 64)
        if found != token.encode():
            objection = ConfigError(f"{storage.url}: holds another job's probe")
    except ObjectNotFoundError:
        objection = ConfigError(
            f"{storage.url} is not the directory that rank 0 sees: `path` must be shared by all "
            f"ranks (a network file system or an object store); use `local_path` for a node's disk"
        )
    except StorageError as error:
        objection = error
    verdicts = vote(exchange, "path-vote", objection)
    if rank == 0:
        storage.delete(f"{PROBE_DIRECTORY}/{token}")
    raise_first(verdicts)
