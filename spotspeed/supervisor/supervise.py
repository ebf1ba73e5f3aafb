"""Runs a launcher again and again: notice, durability, exit code, relaunch on what is left."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from spotspeed.build_locks import remove_dead
from spotspeed.checkpoint.catalog import list_sealed
from spotspeed.core.manifest import MAX_STEP
from spotspeed.core.relaunch import Fits, Policy, Verdict, choose_ranks, decide, judge
from spotspeed.errors import ConfigError, SpotSpeedError
from spotspeed.staging.client import find_saver
from spotspeed.storage import open_storage
from spotspeed.supervised import VARIABLES, write_order
from spotspeed.supervisor.ears import Ears
from spotspeed.supervisor.hosts import (
    answers_ssh,
    new_master,
    reachable,
    read_batch,
    read_hostfile,
    write_hostfile,
)
from spotspeed.supervisor.launcher import Launch, Place, fill, free_port
from spotspeed.supervisor.watching import Deadline, Told, Watch

NOTICE_REASON = "notice"
DRAIN_TIMEOUT_S = 1800.0
DRAIN_TICK_S = 0.05
DRAIN_REPORT_S = 3.0
"""A person who waits for the saver for so long is told why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run, how often, and where.

    `ranks` or `hostfile` (read anew before each launch) give the slots; with `ds_config` the number
    of ranks keeps the global batch. `ssh_port` None: as ssh is configured for each host.
    """

    command: tuple[str, ...]
    relaunch: bool = False
    policy: Policy = field(default_factory=Policy)
    min_ranks: int = 1
    ranks: int | None = None
    hostfile: str | None = None
    ds_config: str | None = None
    deadline: Deadline = field(default_factory=lambda: Deadline(120.0))
    watch_host: bool = True
    ssh_port: int | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One launch that has ended. `ranks` is None where the command alone says how many."""

    ranks: int | None
    ending: str
    code: int
    reason: str
    epochs: dict[str, int]
    """The epoch of this launch, by the path of its checkpoints."""


def supervise(plan: Plan, say: Callable[[str], None]) -> list[Run]:
    """Run `plan` to its end on the main thread; the last launch's code tells how it ended.

    `say` gets one line about everything that is decided. Raises ConfigError for a command that
    cannot be started, and when no number of ranks fits what is left.
    """
    past_s: list[float] = []
    runs: list[Run] = []
    fits: Fits | None = None
    with (
        tempfile.TemporaryDirectory(prefix="spotspeed-supervise-") as folder,
        Ears(say, watch_host=plan.watch_host) as ears,
    ):
        while True:
            place = _place(plan, folder, fits, is_first=not past_s, say=say)
            verdict, told = _launch_once(
                plan, place, Path(folder) / f"launch-{len(past_s)}", ears, say
            )
            runs.append(Run(place.ranks, verdict.ending.name.lower(), verdict.code, verdict.reason,
                            told.epochs))  # fmt: skip
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
                return runs
            say(f"{verdict.reason}; starting again in {decision.delay_s:g} s")
            if not ears.wait(decision.delay_s):
                return runs
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
    hostfile, slots, master = None, plan.ranks, None
    if plan.hostfile is not None:
        listed = read_hostfile(plan.hostfile)
        hosts = reachable(listed, lambda name: answers_ssh(name, plan.ssh_port))
        hostfile = os.path.join(folder, "hostfile")
        write_hostfile(hostfile, hosts)
        master = new_master(os.environ.get("MASTER_ADDR"), listed, hosts)
        if master is not None:
            say(f"MASTER_ADDR {os.environ['MASTER_ADDR']} is gone; it is {master} now")
        slots = min(sum(host.slots for host in hosts), plan.ranks or MAX_STEP)
    if slots is None:
        return Place(port=port)
    batch = read_batch(plan.ds_config) if plan.ds_config is not None else None
    choice = choose_ranks(slots, fits or batch, min_ranks=plan.min_ranks)
    if choice.ranks == 0:
        raise ConfigError(choice.reason)
    say(f"{choice.ranks} ranks: {choice.reason}")
    return Place(choice.ranks, hostfile, port, master)


def _launch_once(
    plan: Plan, place: Place, record: Path, ears: Ears, say: Callable[[str], None]
) -> tuple[Verdict, Told]:
    """Start, watch to the end, wait for the saver, and judge; also what the ranks have said."""
    mark = str(record)
    write_order(mark, deadline_s=plan.deadline.seconds if plan.deadline.is_stated else None)
    for line in remove_dead(os.environ):
        say(line)
    environ = {**os.environ, **dict.fromkeys(VARIABLES, mark)}
    if place.port is not None:
        environ["MASTER_PORT"] = str(place.port)
    if place.master is not None:
        environ["MASTER_ADDR"] = place.master
    launch = Launch(fill(plan.command, place), environ, ears.mask)
    seen = Watch(launch, plan.command, mark, ears=ears, deadline=plan.deadline, say=say).run()
    told = Told.read(mark)

    def is_sealed_everywhere() -> bool:
        sealed = [await_durable(path, epoch, say) for path, epoch in told.epochs.items()]
        return bool(sealed) and all(sealed)

    is_sealed = wait_unless_called(is_sealed_everywhere, ears, say)
    return judge(told.traces(seen, is_notice_sealed=is_sealed)), told


def wait_unless_called(work: Callable[[], bool], ears: Ears, say: Callable[[str], None]) -> bool:
    """What `work`, a wait for savers, says in the end.

    False as soon as somebody calls again: he does not want to wait, and the savers go on anyway.
    """
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(work()), daemon=True)
    thread.start()
    began, calls, is_told = time.monotonic(), max(1, ears.calls), False
    while thread.is_alive():
        if ears.is_urgent or ears.calls > calls:
            say("not waiting for the saver, which goes on by itself")
            return False
        if not is_told and time.monotonic() - began > DRAIN_REPORT_S:
            is_told = True
            say("waiting until the saver has stored everything; Ctrl-C again leaves it to that")
        ears.listen(DRAIN_TICK_S)
    return bool(answers) and answers[0]


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
