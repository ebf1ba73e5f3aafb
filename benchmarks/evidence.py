"""Any launcher, any notice, anyone who hears it, whatever the ranks do: all durable at one step.

    python benchmarks/evidence.py [--saves 4] [--stops 1] [--seed N] [--only PATTERN]
                                  [--record FILE] [--minutes N] [--results FILE]

Pairwise over launcher, notice, who hears it and what the ranks are doing: each pair of values that
can meet is in a cell. Each cell is launches of jobs/cut_job.py with two ranks, one for each of its
stops by the cell's notice, the first after saves of the living job at random moments of what it
does. A cut counts when all ranks agreed on one step, its checkpoint has the parts of all ranks, its
bytes verify, its weights are those that every rank had after that step, and all of them said so and
left. Times count from the moment before the notice, until the last rank. Exits with 1 unless every
cell is whole.

With --record, launches that the file says were whole are taken from it, and new ones are added to
it; with --minutes, none is begun after that long. So a table can be made in pieces.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psutil
from rich.console import Console

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.jobs.cut_watch import (  # noqa: E402
    EXIT_DURABLE,
    LAUNCH_TIMEOUT_S,
    SPOTSPEED,
    STAGES,
    Broken,
    Cut,
    Job,
    Launch,
    await_seal_by_saver,
    check,
    follow,
    interrupt,
    launched,
    machine,
    remove,
    send,
    stop_and_follow,
    write_section,
)

RANKS = 2
LAUNCHERS = ("mpirun", "mpirun, MPI transport", "deepspeed", "torchrun", "supervise mpirun",
             "supervise deepspeed", "supervise torchrun")  # fmt: skip
NOTICES = ("SIGTERM", "SIGUSR1", "file", "notify")
HEARERS = ("rank 0", "rank 1", "all ranks", "launcher", "node")
DOES = ("compute", "collective", "data", "evaluation", "compile", "first", "save")
FACTORS = (LAUNCHERS, NOTICES, HEARERS, DOES)
FORWARDING = tuple(name for name in LAUNCHERS if name.startswith(("mpirun", "supervise")))
"""Launchers that live on after SIGUSR1 to themselves."""
REASONS = (
    "SIGUSR1 to torchrun or `deepspeed` itself ends them and leaves the ranks behind as orphans: "
    "no notice reaches a rank, so these are no cells (`spotspeed supervise` in front is one).",
    "SIGTERM to the `deepspeed` runner ends the runner alone. The cells in which the launcher "
    "hears it signal its child, deepspeed.launcher.launch, which passes it on to rank 0 alone.",
    "SIGTERM to mpirun: it kills its ranks 0.3 s after it has passed the signal on. What counts is "
    "that the saver, which it cannot reach, seals the step that the ranks had agreed on.",
    "torchrun gives 1 whatever its ranks give; `spotspeed supervise` gives 75. A launcher that "
    "hears the notice after `supervise` is `supervise`.",
    "`first`: a save and then a stop while the first batch is awaited, both at step 0: where both "
    "are of one step, the stop is answered by what the save has sealed.",
)
HEADINGS = ("launcher", "notice", "heard by", "ranks are in", "durable", *STAGES, "code")
TITLE = "## evidence.py: any launcher, any notice, any moment"
console = Console(highlight=False, width=160)
Combination = tuple[str, str, str, str]


@dataclass(slots=True)
class Cell:
    """One row of the table."""

    launcher: str
    notice: str
    hearer: str
    does: str
    cuts: list[Cut] = field(default_factory=list)
    in_place: int = 0
    loads: list[float] = field(default_factory=list)

    @property
    def combination(self) -> Combination:
        return self.launcher, self.notice, self.hearer, self.does

    @property
    def is_killed(self) -> bool:
        """Whether the launcher leaves its ranks no time to say anything."""
        return self.launcher.startswith("mpirun") and (self.notice, self.hearer) == (
            "SIGTERM", "launcher")  # fmt: skip

    @property
    def stops(self) -> int:
        return sum(cut.is_stop for cut in self.cuts)

    @property
    def good(self) -> int:
        return sum(not cut.complaint for cut in self.cuts)

    def add(self, other: Cell) -> None:
        """Another launch of this cell."""
        self.cuts += other.cuts
        self.in_place += other.in_place
        self.loads += other.loads

    def expected_codes(self) -> set[int]:
        if self.is_killed:
            return {1, EXIT_DURABLE, 128 + signal.SIGTERM}
        if self.launcher == "torchrun":
            return {1}
        if self.launcher == "deepspeed" and self.hearer == "launcher":
            return {1, EXIT_DURABLE}
        return {EXIT_DURABLE}

    def row(self) -> tuple[str, ...]:
        times = []
        for stage in STAGES:
            found = [cut.seconds[stage] * 1000 for cut in self.cuts if stage in cut.seconds]
            times.append(f"{statistics.median(found):.0f} ({max(found):.0f})" if found else "-")
        codes = {cut.code for cut in self.cuts if cut.is_stop}
        return (*self.combination, f"{self.good} of {len(self.cuts)}", *times,
                ", ".join("none" if code is None else str(code) for code in codes))  # fmt: skip


def can_meet(combination: Combination) -> bool:
    """Whether such a cell exists; REASONS says why others do not."""
    launcher, notice, hearer, _ = combination
    if notice in ("file", "notify"):
        return hearer == "node"
    if hearer == "launcher":
        return notice == "SIGTERM" or launcher in FORWARDING
    return hearer != "node"


def pairwise(chance: random.Random) -> list[Combination]:
    """Few combinations in which every pair of values that can meet does."""
    choices = [c for c in itertools.product(*FACTORS) if can_meet(c)]
    chance.shuffle(choices)
    pairs = {c: set(itertools.combinations(enumerate(c), 2)) for c in choices}
    open_pairs = set().union(*pairs.values())
    chosen: list[Combination] = []
    while open_pairs:
        best = max(choices, key=lambda c: len(pairs[c] & open_pairs))
        chosen.append(best)
        open_pairs -= pairs[best]
    return sorted(chosen, key=_place)


def _place(combination: Combination) -> list[int]:
    return [values.index(value) for values, value in zip(FACTORS, combination, strict=True)]


def run_cell(cell: Cell, folder: pathlib.Path, saves: int, chance: random.Random) -> None:
    """Launch, save at random moments, stop."""
    hearer = {"rank 1": 1}.get(cell.hearer, 0)
    options = ["--does", "mixed" if cell.does == "save" else cell.does]
    options += ["--late", str(1 - hearer if cell.hearer.startswith("rank") else 1)]
    if cell.does == "save":
        options += ["--width", "512"]
    notice = folder / "notice"
    block: dict[str, object] = {"notice": {"file": str(notice)}}
    if cell.launcher.endswith("MPI transport"):
        block["coordinator"] = {"transport": "mpi"}
    launcher = cell.launcher.partition(",")[0]
    launch = Launch(folder, RANKS, chance.randrange(1 << 20), launcher, options=tuple(options),
                    block=block)  # fmt: skip
    with launched(launch) as job:
        job.await_all("enters" if cell.does == "first" else "step", LAUNCH_TIMEOUT_S)
        for _ in range(min(saves, 1) if cell.does == "first" else saves):
            save(job, cell, hearer, chance)
        stop_cell(job, cell, notice, chance)


def save(job: Job, cell: Cell, hearer: int, chance: random.Random) -> None:
    """A cut that the job lives through."""
    cut = Cut("save", RANKS, hearer)
    cell.cuts.append(cut)
    await_moment(job, cell, hearer, chance)
    began = time.monotonic()
    job.ask_for_save(hearer)
    judge(cell, cut, lambda: follow(job, cut, began), lambda: check(job, cut))
    asked = job.of("asked", began)
    cut.phase = asked[0]["phase"] if asked else ""
    cell.in_place += cut.phase == cell.does or cell.does == "save"


def stop_cell(job: Job, cell: Cell, notice: pathlib.Path, chance: random.Random) -> None:
    """The cell's own notice."""
    hearer = {"rank 1": 1}.get(cell.hearer, 0)
    cut = Cut(cell.notice, RANKS, hearer)
    cell.cuts.append(cut)
    strike = strike_of(job, cell, notice)
    await_moment(job, cell, hearer, chance)
    if cell.does == "save":
        job.ask_for_save(chance.randrange(RANKS))
        time.sleep(chance.uniform(0.0, 0.03))
    if cell.is_killed:
        judge(cell, cut, lambda: await_seal_by_saver(job, cut, interrupt(job, cut, strike)),
              lambda: check(job, cut))  # fmt: skip
    else:
        judge(cell, cut, lambda: stop_and_follow(job, cut, strike), lambda: check(job, cut))
    if not cut.complaint and cut.code not in cell.expected_codes():
        cut.complaint = f"the launcher gave {cut.code}, expected {cell.expected_codes()}"
    if cut.complaint:
        cut.complaint += "\n" + job.output.read_text()[-2500:]
    cell.in_place += cut.phase == cell.does or cell.does == "save"


def judge(cell: Cell, cut: Cut, *steps: Callable[[], object]) -> None:
    try:
        for step in steps:
            step()
    except Exception as error:
        cut.complaint = f"{type(error).__name__}: {error}"


def await_moment(job: Job, cell: Cell, hearer: int, chance: random.Random) -> None:
    """A random moment of what the ranks are to be doing."""
    job.look()
    since = time.monotonic()
    if cell.does not in ("save", "first"):
        job.wait_until(
            lambda: any(r["rank"] == hearer and r["phase"] == cell.does
                        for r in job.of("enters", since)),
            f"{cell.does} of rank {hearer}", LAUNCH_TIMEOUT_S,
        )  # fmt: skip
    time.sleep(chance.uniform(0.0, 0.1))


def strike_of(job: Job, cell: Cell, notice: pathlib.Path) -> Callable[[], None]:
    """What gives the cell's notice."""
    if cell.notice == "file":
        return notice.touch
    if cell.notice == "notify":
        words = [*SPOTSPEED, "notify", str(job.launch.path), "--json"]
        return lambda: subprocess.run(
            words, cwd=ROOT, stdout=subprocess.DEVNULL, check=True
        ).check_returncode()
    if cell.hearer != "launcher":
        ranks = [0, 1] if cell.hearer == "all ranks" else [int(cell.hearer[-1])]
        return send(job, ranks, cell.notice)
    process = psutil.Process(job.process.pid)
    if cell.launcher == "deepspeed":
        process = next(child for child in process.children(recursive=True)
                       if "deepspeed.launcher.launch" in child.cmdline())  # fmt: skip
    return lambda: process.send_signal(getattr(signal, cell.notice))


def tell(number: int, of: int, cell: Cell) -> None:
    console.print(f"{number:3d} of {of}  " + "  ".join(cell.row())
                  + f"  ({cell.in_place} in place)", soft_wrap=True)  # fmt: skip
    for cut in cell.cuts:
        if cut.complaint:
            console.print(f"    {cut.kind} in {cut.phase or '?'}: {cut.complaint}", soft_wrap=True,
                          markup=False)  # fmt: skip


def lines_of(cells: list[Cell], seed: int, again: int) -> Iterator[str]:
    """The section of this benchmark in RESULTS.md; `again`: launches that were not whole."""
    whole = sum(cell.good == len(cell.cuts) for cell in cells)
    cuts = sum(len(cell.cuts) for cell in cells)
    in_place = sum(cell.in_place for cell in cells)
    loads = sorted(load for cell in cells for load in cell.loads)
    stops = [sum(c.stops for c in cells if c.launcher == launcher) for launcher in LAUNCHERS]
    yield (f"{machine()}; load {loads[0]:.0f} to {loads[-1]:.0f}, so read shares and codes, not "
           f"times. Seed {seed},")  # fmt: skip
    yield f"{RANKS} ranks, ZeRO 1 in bf16, a model of 17 thousand weights."
    yield ""
    good = sum(cell.good for cell in cells)
    yield (f"**{whole} of {len(cells)} cells whole, {good} of {cuts} cuts durable at one step, "
           f"{min(stops)} to {max(stops)} stops a launcher.**")  # fmt: skip
    yield "Milliseconds to the last rank, median (maximum) of the cell's cuts; `exit` and `code`"
    yield f"are of the stops. {in_place} of the notices fell into what the row names, the others"
    yield "just after it. `notify` includes the start of its own interpreter, `file` half a second"
    yield "of polling. `save`: a save was asked for less than 30 ms before."
    if again:
        yield f"Launches that were not whole at first, and were run again: {again}."
    yield ""
    yield "| " + " | ".join(HEADINGS) + " |"
    yield "|---|---|---|---|" + "---:|" * 6
    for cell in cells:
        yield "| " + " | ".join(cell.row()) + " |"
    yield ""
    for reason in REASONS:
        yield from textwrap.wrap(f"- {reason}", 99, subsequent_indent="  ")


def recorded(file: pathlib.Path | None) -> tuple[dict[Combination, Cell], int]:
    """The whole launches of earlier runs, by cell, and how many were not whole."""
    found: dict[Combination, Cell] = {}
    broken = 0
    for line in file.read_text().splitlines() if file is not None and file.exists() else ():
        fields = json.loads(line)
        cell = Cell(**{**fields, "cuts": [Cut(**cut) for cut in fields["cuts"]]})
        if cell.good < len(cell.cuts):
            broken += 1
        else:
            found.setdefault(cell.combination, Cell(*cell.combination)).add(cell)
    return found, broken


def run_all(cells: list[Cell], arguments: argparse.Namespace, folder: pathlib.Path) -> None:
    """The launches that each cell still lacks, as far as the time goes; all cells once, first."""
    end = time.monotonic() + 60 * arguments.minutes
    wanted = [cell for number in range(arguments.stops) for cell in cells if cell.stops <= number]
    for number, cell in enumerate(wanted, start=1):
        if time.monotonic() > end:
            return
        own = folder / str(number)
        own.mkdir()
        launch = Cell(*cell.combination, loads=[os.getloadavg()[0]])
        chance = random.Random(f"{arguments.seed} {cell.combination} {cell.stops}")
        try:
            run_cell(launch, own, 0 if cell.stops else arguments.saves, chance)
        except Broken as error:
            launch.cuts.append(Cut(cell.notice, RANKS, 0, complaint=str(error)))
        tell(number, len(wanted), launch)
        cell.add(launch)
        if launch.good == len(launch.cuts):
            remove(own)
        if arguments.record is not None:
            with arguments.record.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(launch)) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=4, help="in each cell, before its first stop")
    parser.add_argument("--stops", type=int, default=1, help="in each cell, a launch for each")
    parser.add_argument("--seed", type=int, default=20261124)
    parser.add_argument("--only", default="", help="cells in whose row this pattern is found")
    parser.add_argument("--record", type=pathlib.Path, help="JSON lines of the launches so far")
    parser.add_argument("--minutes", type=float, default=math.inf, help="to begin launches for")
    parser.add_argument("--results", type=pathlib.Path, help="file to write the section into")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no launch is left behind
    known, again = recorded(arguments.record)
    chosen = pairwise(random.Random(arguments.seed))
    cells = [known.get(combination, Cell(*combination)) for combination in chosen]
    asked = [cell for cell in cells if re.search(arguments.only, " | ".join(cell.combination))]
    missing = sum(max(0, arguments.stops - cell.stops) for cell in asked)
    console.print(f"seed {arguments.seed}, {len(asked)} of {len(cells)} cells, {missing} launches")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="spotspeed-evidence-"))
    run_all(asked, arguments, folder)
    cells = [cell for cell in cells if cell.cuts]
    if arguments.results and cells:
        write_section(arguments.results, TITLE, list(lines_of(cells, arguments.seed, again)))
    is_good = all(cell.good == len(cell.cuts) for cell in cells)
    if is_good:
        remove(folder)
    else:
        console.print(f"logs and checkpoints are in {folder}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
