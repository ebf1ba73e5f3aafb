"""Cuts on every occasion that has been thought of, each in a job of its own; see cuts.py."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

import spotspeed
from benchmarks.jobs.cut_watch import (
    CUT_TIMEOUT_S,
    EXIT_DURABLE,
    GONE_S,
    JOB,
    LAUNCH_TIMEOUT_S,
    Broken,
    Cut,
    Job,
    Launch,
    check,
    follow,
    interrupt,
    launched,
    send,
    stop_and_follow,
)

ALONE_S = 2.0
REARMED_S = 4.0
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 3,
                 "hysteresis": 1}}  # fmt: skip
GAS = {"gradient_accumulation_steps": 4}
Strike = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Occasion:
    """One launch: what the job is, and what happens to it. `saves`: it lives through cuts."""

    name: str
    options: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    block: dict[str, Any] = field(default_factory=dict)
    how: str = "signal"
    saves: bool = False


PERIODIC = {"interval": {"steps": 3, "seconds": None}}
OCCASIONS = (
    Occasion("a living job", saves=True),
    Occasion("during periodic saves", block=PERIODIC, saves=True),
    Occasion("in mid accumulation (gas 4)", config=GAS, saves=True),
    Occasion("at fp16 steps, some overflowing", ("--trait", "overflow"), FP16, saves=True),
    Occasion("with asyncio.run between steps", ("--trait", "asyncio"), saves=True),
    Occasion("stop before step 1", ("--does", "first")),
    Occasion("stop in the last step", ("--steps", "6", "--linger", "2"), how="last"),
    Occasion("stop after the last step", ("--steps", "4", "--linger", "8"), how="end"),
    Occasion("stop during a periodic save", block={"interval": {"steps": 1, "seconds": None}}),
    Occasion("stop asked for twice", how="twice"),
    Occasion("stop asked for at all ranks", how="all"),
    Occasion("stop in mid accumulation (gas 4)", config=GAS),
    Occasion("stop at fp16 steps", ("--trait", "overflow"), FP16),
    Occasion("stop with user handlers before and after ours", ("--trait", "handlers")),
    Occasion("stop with asyncio.run between steps", ("--trait", "asyncio")),
    Occasion("stop by SIGTERM, which the script set to SIG_IGN", ("--trait", "ignore"),
             how="ignored"),
    Occasion("SIGTERM to a DataLoader worker, then a stop", ("--does", "data"), how="worker"),
    Occasion("SIGKILL of rank 0 around a save", how="kill first"),
    Occasion("SIGKILL of another rank around a save", how="kill last"),
    Occasion("an exception in one rank", ("--fails", "raise"), how="fails"),
    Occasion("sys.exit(75) in one rank", ("--fails", "exit"), how="fails"),
    Occasion("raise SystemExit(75) in one rank, in a step", ("--fails", "midway"), how="fails"),
    Occasion("the end of the script in one rank", ("--fails", "return"), how="fails"),
)  # fmt: skip


def run_occasion(occasion: Occasion, launch: Launch, saves: int, seed: int) -> list[Cut]:
    """Every cut of one launch; what was wrong is in their complaints."""
    chance = random.Random(seed)
    cuts: list[Cut] = []
    try:
        with launched(launch) as job:
            job.await_all("enters" if "first" in occasion.options else "step", LAUNCH_TIMEOUT_S)
            time.sleep(chance.uniform(0.0, 0.3))
            if occasion.saves:
                for _ in range(saves):
                    cuts.append(save(job, chance))
            else:
                cuts.append(Cut("stop", launch.ranks, chance.randrange(launch.ranks)))
                with told_by(cuts[-1], job):
                    end(job, occasion, cuts[-1], chance)
    except Broken as error:
        cuts.append(Cut("stop", launch.ranks, 0, complaint=str(error)))
    return cuts


@contextlib.contextmanager
def told_by(cut: Cut, job: Job) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        cut.complaint = f"{type(error).__name__}: {error}\n{job.output.read_text()[-2500:]}"


def save(job: Job, chance: random.Random) -> Cut:
    """One rank asks, or the same one twice, or all of them at once."""
    ranks = [chance.randrange(job.ranks)] * chance.choice((1, 1, 2))
    if chance.random() < 0.25:
        ranks = list(range(job.ranks))
    cut = Cut("save", job.ranks, ranks[0])
    time.sleep(chance.uniform(0.0, 0.15))
    began = time.monotonic()
    with told_by(cut, job):
        for rank in ranks:
            job.ask_for_save(rank)
        follow(job, cut, began)
        check(job, cut)
    return cut


def end(job: Job, occasion: Occasion, cut: Cut, chance: random.Random) -> None:
    """The one notice, or death, of a launch."""
    rank, name = cut.noticed_by, chance.choice(("SIGTERM", "SIGUSR1"))
    if occasion.how.startswith("kill"):
        return kill(job, cut, 0 if occasion.how == "kill first" else job.ranks - 1, chance)
    if occasion.how == "fails":
        return watch_failing(job, cut)
    strike = send(job, [rank], name)
    if occasion.how == "last":
        job.await_all("step", CUT_TIMEOUT_S, lambda record: record["step"] == 5)
        time.sleep(chance.uniform(0.0, 0.03))
    elif occasion.how == "end":
        job.await_all("enters", CUT_TIMEOUT_S, lambda record: record["phase"] == "end")
    elif occasion.how == "twice":
        strike = one_after_the_other(send(job, [rank], "SIGTERM"), send(job, [rank], "SIGUSR1"),
                                     chance.uniform(0.0, 0.02))  # fmt: skip
    elif occasion.how == "all":
        strike = send(job, list(range(job.ranks)), name)
    elif occasion.how == "ignored":
        first = job.await_all("step", CUT_TIMEOUT_S)
        later = max(record["at"] for record in first) + REARMED_S
        job.await_all("step", CUT_TIMEOUT_S, lambda record: record["at"] > later)
        strike = send(job, [rank], "SIGTERM")
    elif occasion.how == "worker":
        signal_worker(job, rank)
    stop_and_follow(job, cut, strike)
    check(job, cut)
    if "handlers" in occasion.options and len(job.of("handler")) < 2:
        raise Broken(f"the user's own handlers: {job.of('handler')}")
    if job.launch.launcher != "torchrun" and cut.code != EXIT_DURABLE:
        raise Broken(f"{job.launch.launcher} gave {cut.code}")


def one_after_the_other(first: Strike, second: Strike, pause_s: float) -> Strike:
    def strike() -> None:
        first()
        time.sleep(pause_s)
        with contextlib.suppress(ProcessLookupError):
            second()

    return strike


def signal_worker(job: Job, rank: int) -> None:
    """SIGTERM to that rank's DataLoader worker: nobody may take it for a notice, or die of it."""
    children = psutil.Process(job.processes()[rank]).children()
    workers = [child for child in children if str(JOB) in child.cmdline()]
    if len(workers) != 1:
        raise Broken(f"expected one worker of rank {rank}, found {children}")
    workers[0].terminate()
    since = time.monotonic()
    newest = max(record["step"] for record in job.of("step"))
    job.await_all("step", CUT_TIMEOUT_S, lambda record: record["step"] >= newest + 4)
    if job.of("noticed", since) or job.of("agreed", since):
        raise Broken("a signal to a worker was taken for a notice")


def kill(job: Job, cut: Cut, rank: int, chance: random.Random) -> None:
    """A rank dies around a save: what is sealed is whole, and soon nobody is left."""
    first = save(job, chance)
    if first.complaint:
        raise Broken(first.complaint)

    def strike() -> None:
        job.ask_for_save(chance.randrange(job.ranks))
        time.sleep(chance.uniform(0.0, 0.06))
        os.kill(job.processes()[rank], signal.SIGKILL)

    began = interrupt(job, cut, strike)
    await_nobody(job, began)
    newest = spotspeed.list_checkpoints(str(job.launch.path))[0]
    cut.step, cut.directory = newest.step, newest.directory
    check(job, cut)


def watch_failing(job: Job, cut: Cut) -> None:
    """The last rank ends by itself at some step; the others may not wait for it."""
    last = job.ranks - 1
    began = interrupt(job, cut, lambda: job.order(last, b"fail"), but=last)
    ended = began + cut.seconds["exit"]
    (failing,) = job.of("failing")
    cut.seconds["exit"] = ended - failing["at"]
    await_nobody(job, ended)
    if cut.seconds["exit"] > ALONE_S:
        raise Broken(f"the others ended {cut.seconds['exit']:.1f} s after it")


def await_nobody(job: Job, began: float) -> None:
    """No process of the job, its saver included, is left in time."""
    path = str(job.launch.path)
    while True:
        left = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if path in words or any(job.orders == word for word in words):
                left.append(f"{process.pid} {words[:4]}")
        if not left:
            return
        if time.monotonic() - began > GONE_S:
            raise Broken(f"left after {GONE_S:g} s: {left}")
        time.sleep(0.1)


def launch_of(
    occasion: Occasion, folder: pathlib.Path, launcher: str, ranks: int, seed: int
) -> Launch:
    return Launch(folder, ranks, seed, launcher, options=occasion.options, block=occasion.block,
                  config=occasion.config)  # fmt: skip
