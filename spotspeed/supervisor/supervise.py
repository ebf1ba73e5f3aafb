"""Runs a launcher again and again: notice, durability, exit code, relaunch on what is left."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from spotspeed.checkpoint.catalog import list_sealed
from spotspeed.core.manifest import MAX_STEP
from spotspeed.core.relaunch import Fits, Policy, Verdict, choose_ranks, decide, judge
from spotspeed.errors import ConfigError, SpotSpeedError
from spotspeed.staging.client import find_saver
from spotspeed.storage import open_storage
from spotspeed.supervised import VARIABLE
from spotspeed.supervisor.ears import Ears
from spotspeed.supervisor.hosts import (
    answers_ssh,
    reachable,
    read_batch,
    read_hostfile,
    write_hostfile,
)
from spotspeed.supervisor.launcher import Launch, Place, fill, free_port
from spotspeed.supervisor.watching import Told, Watch

NOTICE_REASON = "notice"
DRAIN_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run, how often, and where.

    `ranks` or `hostfile` (read anew before each launch) give the slots; with `ds_config` the number
    of ranks keeps the global batch. `deadline_s` is what a notice without a time of its own leaves.
    """

    command: tuple[str, ...]
    relaunch: bool = False
    policy: Policy = field(default_factory=Policy)
    min_ranks: int = 1
    ranks: int | None = None
    hostfile: str | None = None
    ds_config: str | None = None
    deadline_s: float = 120.0
    watch_host: bool = True


def supervise(plan: Plan, say: Callable[[str], None]) -> int:
    """Run `plan` to its end on the main thread; returns the exit code that tells how it ended.

    `say` gets one line about everything that is decided. Raises ConfigError for a command that
    cannot be started, and when no number of ranks fits what is left.
    """
    past_s: list[float] = []
    fits: Fits | None = None
    with (
        tempfile.TemporaryDirectory(prefix="spotspeed-supervise-") as folder,
        Ears(watch_host=plan.watch_host) as ears,
    ):
        while True:
            place = _place(plan, folder, fits, is_first=not past_s, say=say)
            verdict, told = _launch_once(
                plan, place, Path(folder) / f"launch-{len(past_s)}", ears, say
            )
            if _runs_on_fewer(plan, place, told, fits) and ears.heard is None:
                fits = Fits(told.fits)
                say(f"the job does not run on {place.ranks} ranks; starting again on fewer")
                past_s.append(time.monotonic())
                continue
            decision = decide(verdict, plan.policy, past_s=past_s, now_s=time.monotonic(),
                              is_doomed=ears.heard is not None)  # fmt: skip
            if not (plan.relaunch and decision.relaunch):
                say(f"{verdict.reason}; leaving with {verdict.code}"
                    + (f" ({decision.reason})" if plan.relaunch else ""))  # fmt: skip
                return verdict.code
            say(f"{verdict.reason}; starting again in {decision.delay_s:g} s")
            if not ears.wait(decision.delay_s):
                return verdict.code
            past_s.append(time.monotonic())


def _runs_on_fewer(plan: Plan, place: Place, told: Told, before: Fits | None) -> bool:
    """Whether the job has named a smaller number of ranks, and can be started on that; once."""
    is_free = place.ranks is not None and any("{ranks}" in word for word in plan.command)
    fewer = [ranks for ranks in told.fits if is_free and ranks < (place.ranks or 0)]
    return plan.relaunch and before is None and bool(fewer)


def _place(
    plan: Plan, folder: str, fits: Fits | None, *, is_first: bool, say: Callable[[str], None]
) -> Place:
    """Where the next launch runs: the hosts that answer, the ranks that fit, a new port."""
    port = None
    if not is_first or any("{port}" in word for word in plan.command):
        port = free_port()
    hostfile, slots = None, plan.ranks
    if plan.hostfile is not None:
        hosts = reachable(read_hostfile(plan.hostfile), answers_ssh)
        hostfile = os.path.join(folder, "hostfile")
        write_hostfile(hostfile, hosts)
        slots = min(sum(host.slots for host in hosts), plan.ranks or MAX_STEP)
    if slots is None:
        return Place(port=port)
    batch = read_batch(plan.ds_config) if plan.ds_config is not None else None
    choice = choose_ranks(slots, fits or batch, min_ranks=plan.min_ranks)
    if choice.ranks == 0:
        raise ConfigError(choice.reason)
    say(f"{choice.ranks} ranks: {choice.reason}")
    return Place(choice.ranks, hostfile, port)


def _launch_once(
    plan: Plan, place: Place, record: Path, ears: Ears, say: Callable[[str], None]
) -> tuple[Verdict, Told]:
    """Start, watch to the end, wait for the saver, and judge; also what the ranks have said."""
    record.touch(mode=0o600)
    mark = str(record)
    environ = {**os.environ, VARIABLE: mark}
    if place.port is not None:
        environ["MASTER_PORT"] = str(place.port)
    launch = Launch(fill(plan.command, place), environ, ears.mask)
    code = Watch(launch, plan.command, mark, ears=ears, deadline_s=plan.deadline_s, say=say).run()
    told = Told.read(mark)
    sealed = [await_durable(path, epoch, say) for path, epoch in told.epochs.items()]
    return judge(told.traces(code, is_notice_sealed=bool(sealed) and all(sealed))), told


def await_durable(path: str, epoch: int, say: Callable[[str], None]) -> bool:
    """Wait for the saver of this node; whether a notice's checkpoint of `epoch` is sealed then."""
    try:
        session = find_saver(path)
        if session is not None:
            with contextlib.closing(session):
                session.drain(MAX_STEP, timeout_s=DRAIN_TIMEOUT_S)
    except SpotSpeedError as error:
        say(f"the saver for {path}: {error}")
    try:
        found = list_sealed(open_storage(path))
    except SpotSpeedError as error:
        say(f"{path}: {error}")
        return False
    return any(info.epoch == epoch and info.reason == NOTICE_REASON for info in found)
