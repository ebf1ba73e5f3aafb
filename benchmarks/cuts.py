"""One notice anywhere, all ranks durable at one step: cuts at random moments, each one checked.

    python benchmarks/cuts.py [--saves 80] [--stops 20] [--ranks 3] [--seed N] [--results FILE]

Runs jobs/cut_job.py under mpirun. Saves: a random rank of one living job is told to ask for a save,
at a random moment. Stops: SIGUSR1 or SIGTERM to a random rank; the next launch, on 2 to 4 ranks,
resumes and is stopped in its turn. Every cut must be one sealed checkpoint to which all ranks
contributed, whose bytes verify, and whose weights are those that every rank had after that step;
every stop must end with 75 and be resumed at exactly that step. Times count from the moment before
the signal is sent. Exits with 1 unless every cut is so. With --results, the section of this
benchmark in that file is written anew.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spotspeed.checkpoint.reader import CheckpointReader  # noqa: E402
from spotspeed.core.layout import KIND_MASTER  # noqa: E402
from spotspeed.storage import open_storage  # noqa: E402
from tests.ranks import (  # noqa: E402
    free_port,
    launch_command,
    rank_environment,
    remove_shared_memory,
    stop,
)

JOB = ROOT / "benchmarks" / "jobs" / "cut_job.py"
LAUNCH_TIMEOUT_S = 240.0
CUT_TIMEOUT_S = 60.0
EXIT_DURABLE = 75
STAGES = ("agreed", "staged", "durable", "exit")
PERCENTILES = (50, 90, 99, 100)
console = Console(highlight=False, width=110)
Record = dict[str, Any]


class Broken(Exception):
    """A promise did not hold, or the job did not get so far."""


@dataclass(slots=True)
class Cut:
    """One notice and what came of it; seconds from the notice to each stage, on the last rank."""

    kind: str
    ranks: int
    noticed_by: int
    phase: str = ""
    step: int = -1
    directory: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    complaint: str = ""


class Job:
    """One launch of the job, watched through the log that its ranks write."""

    def __init__(self, folder: pathlib.Path, ranks: int, *, seed: int, steps: int = 10**9) -> None:
        self.ranks, self.folder = ranks, folder
        self.orders = f"spotspeed-cuts-{os.getpid()}-{seed}"
        self._log, self._read, self._rest = folder / f"log-{seed}.jsonl", 0, b""
        self.output = folder / f"output-{seed}.txt"
        self._log.touch()
        self.records: list[Record] = []
        self._port = free_port()
        command = launch_command(
            ranks, JOB, "--config", str(folder / "config.json"), "--log", str(self._log),
            "--orders", self.orders, "--seed", str(seed), "--steps", str(steps),
        )  # fmt: skip
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=rank_environment(self._port), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip

    def look(self) -> list[Record]:
        """Everything that the ranks have written so far."""
        with self._log.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        self._read += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.records += [json.loads(line) for line in lines]
        return self.records

    def of(self, what: str, since: float = 0.0) -> list[Record]:
        """The records of one kind, from that moment on."""
        return [r for r in self.records if r["kind"] == what and r["at"] >= since]

    def await_all(self, what: str, timeout_s: float, since: float = 0.0) -> list[Record]:
        """The first record of that kind of every rank, by rank; raises Broken."""
        found: dict[int, Record] = {}

        def is_complete() -> bool:
            for record in self.of(what, since):
                found.setdefault(record["rank"], record)
            return len(found) == self.ranks

        self.wait_until(is_complete, f"{what!r} of every rank", timeout_s)
        return [found[rank] for rank in range(self.ranks)]

    def wait_until(self, holds: Callable[[], bool], what: str, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while True:
            is_over = self.process.poll() is not None
            self.look()
            if holds():
                return
            if is_over or time.monotonic() > end:
                why = f"ended with {self.process.returncode}" if is_over else "is silent"
                raise Broken(f"the job {why}, no {what}:\n{self.output.read_text()[-3000:]}")
            time.sleep(0.004)

    def checksums(self, step: int) -> dict[int, int]:
        """What the weights were after that update, by rank."""
        return {r["rank"]: r["checksum"] for r in self.of("step") if r["step"] == step}

    def close(self) -> None:
        stop(self.process)
        remove_shared_memory(self._port)


@contextlib.contextmanager
def launched(folder: pathlib.Path, ranks: int, **options: Any) -> Iterator[Job]:
    job = Job(folder, ranks, **options)
    try:
        yield job
    finally:
        job.close()


def write_config(folder: pathlib.Path) -> None:
    """bf16 and ZeRO stage 1; saves on request and on notice only."""
    config = {
        "train_micro_batch_size_per_gpu": 4, "steps_per_print": 10**9,
        "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "spotspeed": {"path": str(folder / "checkpoints"),
                      "interval": {"steps": None, "seconds": None}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def follow(job: Job, cut: Cut, began: float) -> None:
    """Wait until the cut is sealed, and note when every rank got how far."""
    agreed = job.await_all("agreed", CUT_TIMEOUT_S, began)
    if len({(r["step"], r["round"], r["stop"]) for r in agreed}) != 1:
        raise Broken(f"the ranks agreed on different cuts: {agreed}")
    staged = job.await_all("staged", CUT_TIMEOUT_S, began)
    job.wait_until(lambda: bool(job.of("sealed", began)), "sealed checkpoint", CUT_TIMEOUT_S)
    sealed = job.of("sealed", began)[0]
    cut.step, cut.directory = agreed[0]["step"], sealed["directory"]
    if {r["directory"] for r in staged} != {cut.directory} or sealed["step"] != cut.step:
        raise Broken(f"agreed on step {cut.step}, staged {staged}, sealed {sealed}")
    if agreed[0]["stop"] is not (cut.kind != "save"):
        raise Broken(f"a {cut.kind} became {agreed[0]}")
    cut.seconds["agreed"] = max(r["at"] for r in agreed) - began
    cut.seconds["staged"] = max(r["at"] for r in staged) - began
    cut.seconds["durable"] = sealed["at"] - began


def check(job: Job, cut: Cut) -> None:
    """The checkpoint is whole, of all ranks, and holds the weights that they had; raises."""
    storage = open_storage(str(job.folder / "checkpoints"))
    reader = CheckpointReader.open(storage, cut.directory)
    ticket = reader.manifest.ticket
    if (ticket.step, ticket.world_size) != (cut.step, job.ranks):
        raise Broken(f"sealed {ticket}, expected step {cut.step} of {job.ranks} ranks")
    receipts = sorted(record.rank for record in reader.manifest.receipts)
    if receipts != list(range(job.ranks)):
        raise Broken(f"{cut.directory} has the receipts of ranks {receipts}")
    reader.verify()
    stored = 0
    for key in sorted(key for key in reader.tensors() if key.kind == KIND_MASTER):
        weight = torch.from_numpy(reader.read_tensor(key)).bfloat16().contiguous()
        stored = zlib.crc32(weight.view(torch.uint8).numpy(), stored)
    had = job.checksums(cut.step)
    if had != dict.fromkeys(range(job.ranks), stored):
        raise Broken(f"{cut.directory}: weights {stored}, the ranks had {had} at {cut.step}")


def run_saves(folder: pathlib.Path, ranks: int, count: int, chance: random.Random) -> list[Cut]:
    """Many saves of one living job."""
    cuts: list[Cut] = []
    if not count:
        return cuts
    seed = chance.randrange(1 << 20)
    with (
        launched(folder, ranks, seed=seed) as job,
        contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as orders,
    ):
        job.await_all("step", LAUNCH_TIMEOUT_S)
        while len(cuts) < count:
            cut = Cut("save", ranks, chance.randrange(ranks))
            cuts.append(cut)
            time.sleep(chance.uniform(0.0, 0.2))
            began = time.monotonic()
            orders.sendto(b"save", f"\0{job.orders}-{cut.noticed_by}")
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
            with launched(folder, ranks, seed=chance.randrange(1 << 20)) as job:
                check_resumed(job, expected, cuts[-2] if expected and len(cuts) > 1 else None)
                time.sleep(chance.uniform(0.0, 0.5))
                interrupt(job, cut)
                check(job, cut)
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
        with launched(folder, 2, seed=seed, steps=2) as job:
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


def interrupt(job: Job, cut: Cut) -> None:
    """Send the signal, follow the cut, and wait until nobody is left."""
    processes = {r["rank"]: r["pid"] for r in job.of("begun")}
    poller, left = select.poll(), {os.pidfd_open(pid) for pid in processes.values()}
    for descriptor in left:
        poller.register(descriptor, select.POLLIN)
    began = time.monotonic()
    os.kill(processes[cut.noticed_by], getattr(signal, cut.kind))
    end = began + CUT_TIMEOUT_S
    while left and time.monotonic() < end:
        for descriptor, _ in poller.poll(1000):
            poller.unregister(descriptor)
            left.remove(descriptor)
            os.close(descriptor)
    cut.seconds["exit"] = time.monotonic() - began
    if left:
        raise Broken(f"{len(left)} of {job.ranks} ranks are there after {CUT_TIMEOUT_S:g} s")
    code = job.process.wait(CUT_TIMEOUT_S)
    job.look()
    follow(job, cut, began)
    cut.phase = job.of("noticed", began)[0]["phase"]
    if code != EXIT_DURABLE:
        raise Broken(f"mpirun ended with {code}")


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


def machine(load: tuple[float, float, float]) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    now = datetime.datetime.now(datetime.UTC).date()
    return (f"{os.cpu_count()} cores, {memory:.0f} GiB, {now}, load {load[0]:.1f} when it began "
            f"and {os.getloadavg()[0]:.1f} when it ended")  # fmt: skip


def write_results(path: pathlib.Path, cuts: list[Cut], seed: int, where: str) -> None:
    """Replace this benchmark's section of the file."""
    title = "## cuts.py: one notice anywhere, all ranks durable at one step"
    headline, fell = summary(cuts, seed)
    lines = [title, "", where + ".", "", f"**{headline}.** Milliseconds, until the last rank.",
             fell, "", "| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * 5]  # fmt: skip
    lines += ["| " + " | ".join(row) + " |" for row in rows(cuts)]
    text = path.read_text() if path.exists() else "# What the benchmarks found\n"
    before, found, after = text.partition(title)
    rest = after[after.index("\n## ") :] if found and "\n## " in after else ""
    path.write_text(before.rstrip("\n") + "\n\n" + "\n".join(lines) + "\n" + rest)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=80)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=3, help="of the job that only saves")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 20))
    parser.add_argument("--results", type=pathlib.Path, help="file to write the section into")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no launch is left behind
    console.print(f"seed {arguments.seed}")
    chance, load = random.Random(arguments.seed), os.getloadavg()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="spotspeed-cuts-"))
    write_config(folder)
    cuts = run_saves(folder, arguments.ranks, arguments.saves, chance)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    cuts += run_stops(folder, arguments.stops, chance)

    table = Table(*HEADINGS, box=box.SIMPLE, title="milliseconds, until the last rank")
    for row in rows(cuts):
        table.add_row(*row)
    console.print(table)
    headline, where = summary(cuts, arguments.seed)
    console.print(where)
    console.print(machine(load))
    console.print(f"[bold]{headline}[/bold]")
    if arguments.results:
        write_results(arguments.results, cuts, arguments.seed, machine(load))
    is_whole = len(cuts) == arguments.saves + arguments.stops
    is_good = is_whole and not any(cut.complaint for cut in cuts)
    if is_good:
        shutil.rmtree(folder)
    else:
        console.print(f"logs and checkpoints are in {folder}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
