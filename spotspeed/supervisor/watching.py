"""Watches one launch to its end: passes a notice on to its ranks, and clears up what stays."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from spotspeed.core.relaunch import Traces
from spotspeed.errors import SpotSpeedError
from spotspeed.supervised import heard
from spotspeed.supervisor.ears import Ears
from spotspeed.supervisor.launcher import FORWARDERS, Launch, launcher_name
from spotspeed.supervisor.notifying import tell_saver
from spotspeed.supervisor.processes import Member, end_all, members, send

LOOK_S = 0.2
SLOW_LOOK_S = 2.0
FORWARD_AFTER_S = 1.0
"""A notice goes through the launcher when no rank has been found here for so long."""
LINGER_S = 10.0
"""How long a launcher may outlive its ranks, or ranks their launcher when nobody told them."""
UNHEARD_S = 30.0
"""How long ranks that have not attached yet may take to hear a notice."""
KILL_GRACE_S = 5.0


@dataclass(slots=True)
class Told:
    """What the ranks of a launch have said."""

    epochs: dict[str, int] = field(default_factory=dict)
    """Epoch of the launch, by the path of its checkpoints."""
    attached: set[int] = field(default_factory=set)
    closed: set[int] = field(default_factory=set)
    codes: dict[int, int] = field(default_factory=dict)
    """By process id."""
    errors: dict[int, str] = field(default_factory=dict)
    """What the script of a rank has failed with."""
    deadline_s: float | None = None
    """What a notice leaves time for, as the job's block has it."""
    fits: frozenset[int] = frozenset()
    """The numbers of ranks that the job could run on, where this launch's was none of them."""

    @classmethod
    def read(cls, mark: str) -> Told:
        """Everything so far."""
        told = cls()
        for facts in heard(mark):
            if "pid" not in facts:
                continue  # The supervisor's own order.
            pid = int(facts["pid"])
            if "attached" in facts:
                told.epochs[str(facts["path"])] = int(facts["epoch"])
                told.deadline_s = float(facts["deadline_s"])
                told.attached.add(pid)
            elif "error" in facts:
                told.errors[pid] = str(facts["error"])
            elif "closed" in facts:
                told.closed.add(pid)
            elif "code" in facts:
                told.codes[pid] = int(facts["code"])
            elif "fits" in facts:
                told.fits = frozenset(map(int, facts["fits"]))
        return told

    def traces(self, seen: Seen, *, is_notice_sealed: bool) -> Traces:
        """The same for `core.relaunch.judge`."""
        return Traces(
            seen.code, tuple(self.codes.values()), len(self.attached), len(self.closed),
            is_notice_sealed, tuple(self.errors.values()), seen.is_noticed, seen.is_ended,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of a launch: its code, whether a notice came, and whether it was ended here."""

    code: int
    is_noticed: bool
    is_ended: bool


@dataclass(frozen=True, slots=True)
class Deadline:
    """Seconds that a notice without a time of its own leaves; the job's own unless stated."""

    seconds: float
    is_stated: bool = False


class Watch:
    """One launch from its start until none of its processes is left on this machine."""

    def __init__(
        self, launch: Launch, command: Sequence[str], mark: str, *, ears: Ears,
        deadline: Deadline, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._launch, self._mark, self._ears, self._say = launch, mark, ears, say
        self._deadline, self._deadline_s = deadline, deadline.seconds
        self._forwards = launcher_name(command) in FORWARDERS
        self._told: set[tuple[int, int]] = set()
        self._noticed_at: float | None = None
        self._alone_since: float | None = None
        self._looked_at = 0.0
        self._is_ending = False

    def run(self) -> Seen:
        """Watch to the end."""
        while (code := self._launch.poll()) is None:
            self._ears.listen()
            self._look(time.monotonic())
        self._await_ranks()
        return Seen(code, self._noticed_at is not None, self._is_ending)

    def _members(self, attached: Collection[int] = ()) -> list[Member]:
        return members(self._mark, attached)

    def _look(self, now: float) -> None:
        """One look at a launch whose launcher runs."""
        ears = self._ears
        if self._noticed_at is None and ears.heard is not None:
            self._noticed_at = now
            self._deadline_s = self._time_left()
            self._say(f"{ears.heard}: the ranks have {self._deadline_s:g} s to become durable")
        if ears.is_urgent:
            self._end("told to stop now", grace_s=0.0)
            return
        pause_s = SLOW_LOOK_S if self._noticed_at is None else LOOK_S
        if now - self._looked_at < pause_s:
            return
        self._looked_at = now
        told = Told.read(self._mark)
        ranks = [member for member in self._members(told.attached) if member.is_rank]
        if self._noticed_at is not None:
            if not self._told and any(rank.is_attached and rank.hears is None for rank in ranks):
                self._tell_savers(told.epochs, now - self._noticed_at)
            self._pass_on(ranks, now - self._noticed_at)
        self._check_abandoned(bool(ranks), bool(told.codes), now)

    def _time_left(self) -> float:
        """What the notice that was heard leaves."""
        if self._ears.seconds_left is not None:
            return self._ears.seconds_left
        own_s = None if self._deadline.is_stated else Told.read(self._mark).deadline_s
        return self._deadline.seconds if own_s is None else own_s

    def _tell_savers(self, paths: Iterable[str], since_s: float) -> None:
        """Ranks that listen to no signal hear through the saver of their node."""
        for path in paths:
            with contextlib.suppress(SpotSpeedError):
                if tell_saver(path, seconds_left=max(1.0, self._deadline_s - since_s)):
                    self._told.add((self._launch.pid, 0))

    def _pass_on(self, ranks: Sequence[Member], since_s: float) -> None:
        """Tell every rank that has attached; one is enough, the others are for speed."""
        for member in ranks:
            number = member.hears
            key = (member.pid, member.ticks)
            if number is not None and key not in self._told and send(member, number):
                self._told.add(key)
        if not self._told and self._forwards and not ranks and since_s > FORWARD_AFTER_S:
            self._say("no rank runs on this machine: SIGUSR1 to the launcher")
            self._launch.send(signal.SIGUSR1)
            self._told.add((self._launch.pid, 0))
        if since_s > self._deadline_s:
            self._end("the time is over", grace_s=KILL_GRACE_S)
        elif not self._told and since_s > UNHEARD_S:
            self._end("no rank has listened", grace_s=KILL_GRACE_S)

    def _check_abandoned(self, has_ranks: bool, have_left: bool, now: float) -> None:
        """A launcher that stays although its ranks have left is ended."""
        if has_ranks or not have_left:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        elif now - self._alone_since > LINGER_S:
            self._end("the ranks have left and the launcher stays", grace_s=KILL_GRACE_S)

    def _end(self, why: str, *, grace_s: float) -> None:
        if not self._is_ending:
            self._is_ending = True
            self._say(f"{why}: ending the launch")
            calls = max(1, self._ears.calls)

            def is_urgent() -> bool:
                self._ears.listen()
                return self._ears.is_urgent or self._ears.calls > calls

            end_all(self._members, grace_s=grace_s, is_urgent=is_urgent)

    def _await_ranks(self) -> None:
        """Ranks outlive a launcher that was killed: let them leave by themselves, for a while."""
        began = time.monotonic()
        while self._members():
            self._ears.listen()
            now = time.monotonic()
            self._look(now)
            limit_s = LINGER_S if self._noticed_at is None else self._deadline_s
            if not self._is_ending and now - max(began, self._noticed_at or 0.0) > limit_s:
                self._end("processes are left over", grace_s=KILL_GRACE_S)
            if self._is_ending:
                return
