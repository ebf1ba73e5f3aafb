"""One notice anywhere, all ranks durable at one step: cuts at random moments, each one checked.

    python benchmarks/cuts.py [--saves 80] [--stops 20] [--ranks 3] [--seed N] [--results FILE]
    python benchmarks/cuts.py --launcher mpirun|deepspeed [--ranks 4] [--cuts 200] [--only TEXT]
                              [--record FILE] [--minutes N] [--results FILE]

Runs jobs/cut_job.py. The first form, under mpirun. Saves: a random rank of one living job is told
to ask for a save, at a random moment. Stops: SIGUSR1 or SIGTERM to a random rank; the next launch,
on 2 to 4 ranks, resumes and is stopped in its turn. The second form: so many cuts, most of them
saves of living jobs, on every occasion of jobs/cut_occasions.py; with --record, cuts that the
file says were whole are taken from it and new ones added to it, and with --minutes no launch is
begun after that long, so that a table can be made in pieces. Every cut must be one sealed
checkpoint to which all ranks contributed, whose bytes verify, and whose weights are those that
every rank had after that step; every stop must end with 75 and, in the first form, be resumed at
exactly that step. Times count from the moment before the signal is sent. Exits with 1 unless every
cut is so. With --results, the section of this benchmark in that file is written anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.jobs.cut_occasions import OCCASIONS, launch_of, run_occasion  # noqa: E402
from benchmarks.jobs.cut_watch import (  # noqa: E402
    CUT_TIMEOUT_S,
    EXIT_DURABLE,
    LAUNCH_TIMEOUT_S,
    STAGES,
    Broken,
    Cut,
    Job,
    Launch,
    check,
    follow,
    launched,
    machine,
    remove,
    send,
    stop_and_follow,
    write_section,
)

PERCENTILES = (50, 90, 99, 100)
TITLE = "## cuts.py: one notice anywhere, all ranks durable at one step"
console = Console(highlight=False, width=110)
Found = dict[str, list[Cut]]


def run_saves(folder: pathlib.Path, ranks: int, count: int, chance: random.Random) -> list[Cut]:
    """Many saves of one living job."""
    cuts: list[Cut] = []
    if not count:
        return cuts
    with launched(Launch(folder, ranks, chance.randrange(1 << 20))) as job:
        job.await_all("step", LAUNCH_TIMEOUT_S)
        while len(cuts) < count:
            cut = Cut("save", ranks, chance.randrange(ranks))
            cuts.append(cut)
            time.sleep(chance.uniform(0.0, 0.2))
            began = time.monotonic()
            job.ask_for_save(cut.noticed_by)
            try:
                follow(job, cut, began)
                cut.phase = job.of("asked", began)[0]["phase"]
                check(job, cut)
            except Exception as error:
                cut.complaint = f"{type(error).__name__}: {error}"
            tell(len(cuts), cut)
            if job.process.poll() is not None:
                break
    return cuts


def run_stops(folder: pathlib.Path, count: int, chance: random.Random) -> list[Cut]:
    """Launch after launch, each resumed where the one before was stopped."""
    cuts: list[Cut] = []
    expected: tuple[int, int] | None = None
    while len(cuts) < count:
        ranks = chance.randint(2, 4)
        name = chance.choice(("SIGUSR1", "SIGTERM"))
        cut = Cut(name, ranks, chance.randrange(ranks))
        cuts.append(cut)
        try:
            with launched(Launch(folder, ranks, chance.randrange(1 << 20))) as job:
                check_resumed(job, expected, cuts[-2] if expected and len(cuts) > 1 else None)
                time.sleep(chance.uniform(0.0, 0.5))
                stop_and_follow(job, cut, send(job, [cut.noticed_by], name))
                check(job, cut)
                if cut.code != EXIT_DURABLE:
                    raise Broken(f"mpirun ended with {cut.code}")
                expected = (cut.step, job.checksums(cut.step)[0])
        except Exception as error:
            cut.complaint = cut.complaint or f"{type(error).__name__}: {error}"
            expected = None
        tell(len(cuts), cut)
    if expected is not None:
        finish(folder, expected, cuts[-1], chance.randrange(1 << 20))
    return cuts


def finish(folder: pathlib.Path, expected: tuple[int, int], last: Cut, seed: int) -> None:
    """Resume once more, and let that launch end by itself."""
    try:
        with launched(Launch(folder, 2, seed, options=("--steps", "2"))) as job:
            check_resumed(job, expected, last)
            if job.process.wait(CUT_TIMEOUT_S) != 0:
                raise Broken(f"the last launch ended with {job.process.returncode}")
    except Exception as error:
        last.complaint = last.complaint or f"{type(error).__name__}: {error}"


def check_resumed(job: Job, expected: tuple[int, int] | None, previous: Cut | None) -> None:
    """Wait for the first steps; what is wrong with how they began is `previous`'s fault."""
    first = job.await_all("step", LAUNCH_TIMEOUT_S)
    restored = job.await_all("restored", 1.0)
    if expected is None or previous is None:
        return
    found = {(r["step"], r["checksum"]) for r in restored}
    if found != {expected} or {r["step"] for r in first} != {expected[0] + 1}:
        previous.complaint = f"stopped at {expected}, resumed at {found}, first steps {first}"


def tell(number: int, cut: Cut) -> None:
    times = "  ".join(f"{stage} {s * 1000:.0f} ms" for stage, s in cut.seconds.items())
    verdict = f"[red]{cut.complaint}[/red]" if cut.complaint else f"step {cut.step}"
    console.print(f"{number:4d} {cut.kind:8s} rank {cut.noticed_by} of {cut.ranks} in "
                  f"{cut.phase or '?':10s} {times}  {verdict}", soft_wrap=True)  # fmt: skip


def rows(cuts: list[Cut]) -> Iterator[tuple[str, ...]]:
    """Kind and stage, number of cuts, and the percentiles in milliseconds."""
    for name, chosen in (("save", [c for c in cuts if c.kind == "save"]),
                         ("stop", [c for c in cuts if c.kind != "save"])):  # fmt: skip
        for stage in STAGES:
            times = sorted(c.seconds[stage] * 1000 for c in chosen if stage in c.seconds)
            if times:
                last = len(times) - 1
                yield (f"{name}, notice to {stage}", str(len(times)),
                       *(f"{times[round(last * p / 100)]:.1f}" for p in PERCENTILES))  # fmt: skip


HEADINGS = ("", "cuts", "p50", "p90", "p99", "max")


def summary(cuts: list[Cut], seed: int) -> tuple[str, str]:
    """What was reached, and where the notices fell."""
    good = sum(not cut.complaint for cut in cuts)
    phases = Counter(cut.phase or "?" for cut in cuts)
    where = ", ".join(f"{phase} {number}" for phase, number in phases.most_common())
    return (f"{good} of {len(cuts)} durable at one step",
            f"Notices fell in: {where}. Seed {seed}.")  # fmt: skip


def section(cuts: list[Cut], seed: int, load: float) -> list[str]:
    """What goes into the file of results."""
    headline, fell = summary(cuts, seed)
    where = f"{machine()}, load {load:.1f} when it began and {os.getloadavg()[0]:.1f} at its end."
    lines = [where, "", f"**{headline}.** Milliseconds, until the last rank.", fell, "",
             "| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * 5]  # fmt: skip
    return lines + ["| " + " | ".join(row) + " |" for row in rows(cuts)]


def run_occasions(folder: pathlib.Path, arguments: argparse.Namespace) -> Found:
    """The second form: the cuts of each occasion, those on record included."""
    chosen = [occasion for occasion in OCCASIONS if arguments.only in occasion.name]
    living = sum(occasion.saves for occasion in OCCASIONS)
    saves = max(1, (arguments.cuts - len(OCCASIONS) + living) // living)
    end = time.monotonic() + 60 * arguments.minutes
    found = recorded(arguments)
    for number, occasion in enumerate(chosen):
        missing = (saves if occasion.saves else 1) - len(found.get(occasion.name, ()))
        if missing <= 0 or time.monotonic() > end:
            continue
        own = folder / str(number)
        own.mkdir()
        seed = arguments.seed + OCCASIONS.index(occasion)
        launch = launch_of(occasion, own, arguments.launcher, arguments.ranks, seed)
        load = os.getloadavg()[0]
        cuts = run_occasion(occasion, launch, missing, seed)
        found.setdefault(occasion.name, []).extend(cuts)
        record(arguments, occasion.name, cuts, load)
        good = sum(not cut.complaint for cut in cuts)
        console.print(f"{good} of {len(cuts)}  {occasion.name}", soft_wrap=True)
        for cut in cuts:
            if cut.complaint:
                console.print(f"    {cut.kind}: {cut.complaint}", soft_wrap=True, markup=False)
        if good == len(cuts):
            remove(own)
    return {each.name: found[each.name] for each in OCCASIONS if each.name in found}


def record(arguments: argparse.Namespace, name: str, cuts: list[Cut], load: float) -> None:
    """Add one launch to the file."""
    if arguments.record is None:
        return
    line = {"launcher": arguments.launcher, "ranks": arguments.ranks, "occasion": name,
            "load": load, "cuts": [dataclasses.asdict(cut) for cut in cuts]}  # fmt: skip
    with arguments.record.open("a") as file:
        file.write(json.dumps(line) + "\n")


def lines_on_record(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The launches on record that are of this launcher and so many ranks."""
    file = arguments.record
    lines = file.read_text().splitlines() if file is not None and file.exists() else []
    found = [json.loads(line) for line in lines]
    wanted = (arguments.launcher, arguments.ranks)
    return [line for line in found if (line["launcher"], line["ranks"]) == wanted]


def recorded(arguments: argparse.Namespace) -> Found:
    """The whole cuts of earlier runs, by occasion."""
    found: Found = {}
    for line in lines_on_record(arguments):
        cuts = [Cut(**cut) for cut in line["cuts"]]
        whole = [cut for cut in cuts if not cut.complaint]
        if whole:
            found.setdefault(line["occasion"], []).extend(whole)
    return found


def occasion_rows(found: Found) -> Iterator[tuple[str, ...]]:
    """Occasion, whole cuts, the slowest of each stage in ms, codes of launchers."""
    for name, cuts in found.items():
        slowest = []
        for stage in STAGES:
            times = [cut.seconds[stage] * 1000 for cut in cuts if stage in cut.seconds]
            slowest.append(f"{max(times):.0f}" if times else "-")
        codes = sorted({str(cut.code) for cut in cuts if cut.code is not None})
        good = sum(not cut.complaint for cut in cuts)
        yield (name, f"{good} of {len(cuts)}", *slowest, ", ".join(codes) or "-")


def write_occasions(path: pathlib.Path, found: Found, arguments: argparse.Namespace) -> None:
    cuts = [cut for each in found.values() for cut in each]
    good = sum(not cut.complaint for cut in cuts)
    loads = [os.getloadavg()[0], *(line["load"] for line in lines_on_record(arguments))]
    broken = sum(bool(cut["complaint"]) for line in lines_on_record(arguments)
                 for cut in line["cuts"])  # fmt: skip
    again = broken - (len(cuts) - good)
    lines = [f"{machine()}, load {min(loads):.0f} to {max(loads):.0f}; seed {arguments.seed}.", "",
             f"**{good} of {len(cuts)} whole.** The slowest of each stage, in ms to the last rank.",
             *([f"Not whole at first, and tried again: {again} cuts."] if again > 0 else []),
             "", "| occasion | whole | " + " | ".join(STAGES) + " | code |",
             "|---|---:|" + "---:|" * (len(STAGES) + 1)]  # fmt: skip
    lines += ["| " + " | ".join(row) + " |" for row in occasion_rows(found)]
    ranks = f"{arguments.ranks} ranks under {arguments.launcher}"
    write_section(path, f"## cuts.py on every occasion, {ranks}", lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=80)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=3, help="of the job that only saves")
    parser.add_argument("--launcher", choices=("mpirun", "deepspeed", "torchrun"))
    parser.add_argument("--cuts", type=int, default=200, help="on all occasions together")
    parser.add_argument("--only", default="", help="occasions whose name has this text")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 20))
    parser.add_argument("--record", type=pathlib.Path, help="JSON lines of the launches so far")
    parser.add_argument("--minutes", type=float, default=math.inf, help="to begin launches for")
    parser.add_argument("--results", type=pathlib.Path, help="file to write the section into")
    return parser.parse_args()


def run_random(folder: pathlib.Path, arguments: argparse.Namespace, load: float) -> list[Cut]:
    """The first form."""
    chance = random.Random(arguments.seed)
    cuts = run_saves(folder, arguments.ranks, arguments.saves, chance)
    remove(folder / "checkpoints")
    cuts += run_stops(folder, arguments.stops, chance)
    table = Table(*HEADINGS, box=box.SIMPLE, title="milliseconds, until the last rank")
    for row in rows(cuts):
        table.add_row(*row)
    console.print(table)
    headline, where = summary(cuts, arguments.seed)
    console.print(f"{where}\n[bold]{headline}[/bold]")
    if arguments.results:
        write_section(arguments.results, TITLE, section(cuts, arguments.seed, load))
    return cuts


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no launch is left behind
    console.print(f"seed {arguments.seed}")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="spotspeed-cuts-"))
    load = os.getloadavg()[0]
    if arguments.launcher is None:
        cuts = run_random(folder, arguments, load)
        is_whole = len(cuts) == arguments.saves + arguments.stops
    else:
        found = run_occasions(folder, arguments)
        cuts, is_whole = [cut for each in found.values() for cut in each], True
        if arguments.results:
            write_occasions(arguments.results, found, arguments)
    is_good = is_whole and not any(cut.complaint for cut in cuts)
    if is_good:
        remove(folder)
    else:
        console.print(f"logs and checkpoints are in {folder}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
