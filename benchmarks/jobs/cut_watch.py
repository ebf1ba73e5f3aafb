"""Launches jobs/cut_job.py under a launcher, watches what its ranks write down, and judges cuts."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

import spotspeed
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.core.layout import KIND_MASTER
from spotspeed.storage import open_storage
from tests.ranks import free_port, launch_command, rank_environment, remove_shared_memory, stop

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
JOB = ROOT / "benchmarks" / "jobs" / "cut_job.py"
LAUNCH_TIMEOUT_S = 240.0
CUT_TIMEOUT_S = 60.0
GONE_S = 10.0
EXIT_DURABLE = 75
STAGES = ("agreed", "staged", "durable", "exit")
SPOTSPEED = (sys.executable, "-m", "spotspeed")
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
    code: int | None = None
    complaint: str = ""

    @property
    def is_stop(self) -> bool:
        return self.kind != "save"


@dataclass(frozen=True, slots=True)
class Launch:
    """How a job is launched; `options` go to the job, `block` into its "spotspeed" block.

    `launcher` is mpirun, deepspeed or torchrun, or one of them after "supervise ".
    """

    folder: pathlib.Path
    ranks: int
    seed: int
    launcher: str = "mpirun"
    options: tuple[str, ...] = ()
    block: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> pathlib.Path:
        return self.folder / "checkpoints"

    def write_config(self) -> pathlib.Path:
        """bf16 and ZeRO stage 1; saves on request and on notice only, unless told otherwise."""
        config = {
            "train_micro_batch_size_per_gpu": 4, "steps_per_print": 10**9,
            "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "spotspeed": {"path": str(self.path), "interval": {"steps": None, "seconds": None},
                          **self.block},
            **self.config,
        }  # fmt: skip
        if "fp16" in config:
            del config["bf16"]
        file = self.folder / f"config-{self.seed}.json"
        file.write_text(json.dumps(config))
        return file

    def command(self, port: int, words: tuple[str, ...]) -> list[str]:
        """The launcher's command line, `supervise` in front where asked; `words` are the job's."""
        before, _, launcher = self.launcher.rpartition(" ")
        supervise = [*SPOTSPEED, "supervise", "--"] if before else []
        return supervise + self._launch(launcher, port, words)

    def _launch(self, launcher: str, port: int, words: tuple[str, ...]) -> list[str]:
        script = [str(JOB), *words]
        tools = pathlib.Path(sys.executable)
        if launcher == "deepspeed":
            return [str(tools.with_name("deepspeed")), "--num_gpus", str(self.ranks),
                    "--master_port", str(port), *script]  # fmt: skip
        if launcher == "torchrun":
            # Without the dashes torchrun takes a script's options for abbreviations of its own.
            return [str(tools.with_name("torchrun")), "--nproc-per-node", str(self.ranks),
                    "--master-port", str(port), "--", *script]  # fmt: skip
        return launch_command(self.ranks, *script)


class Job:
    """One launch of the job, watched through the log that its ranks write."""

    def __init__(self, launch: Launch) -> None:
        self.launch, self.ranks = launch, launch.ranks
        folder, seed = launch.folder, launch.seed
        self.orders = f"spotspeed-cuts-{os.getpid()}-{seed}"
        self._log, self._read, self._rest = folder / f"log-{seed}.jsonl", 0, b""
        self.output = folder / f"output-{seed}.txt"
        self._log.touch()
        self.records: list[Record] = []
        self._port = free_port()
        command = launch.command(self._port, (
            "--config", str(launch.write_config()), "--log", str(self._log),
            "--orders", self.orders, "--seed", str(seed), *launch.options,
        ))  # fmt: skip
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT,
                env=rank_environment(self._port, {"PYTHONPATH": str(ROOT)}),
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, text=True,
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

    def await_all(
        self, what: str, timeout_s: float, is_meant: Callable[[Record], bool] = bool
    ) -> list[Record]:
        """The first record of that kind that is meant, of every rank, by rank; raises Broken."""
        found: dict[int, Record] = {}

        def is_complete() -> bool:
            for record in self.of(what):
                if is_meant(record):
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

    def processes(self) -> dict[int, int]:
        """Process ids by rank."""
        return {r["rank"]: r["pid"] for r in self.of("begun")}

    def ask_for_save(self, rank: int) -> None:
        """Tell that rank to want a save."""
        self.order(rank, b"save")

    def order(self, rank: int, word: bytes) -> None:
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as orders:
            orders.sendto(word, f"\0{self.orders}-{rank}")

    def checksums(self, step: int) -> dict[int, int]:
        """What the weights were after that update, by rank."""
        known = [*self.of("restored"), *self.of("step")]
        return {r["rank"]: r["checksum"] for r in known if r["step"] == step}

    def close(self) -> None:
        stop(self.process)
        for process in psutil.process_iter(["cmdline"]):
            # A launcher may leave its ranks behind, and `deepspeed` its own other half.
            if self.orders in (process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        remove_shared_memory(self._port)


@contextlib.contextmanager
def launched(launch: Launch) -> Iterator[Job]:
    job = Job(launch)
    try:
        yield job
    finally:
        job.close()


def follow(job: Job, cut: Cut, began: float) -> None:
    """Wait until the cut is sealed, and note when every rank got how far."""
    agreed = first_agreement(job, cut, began)
    cut.step = agreed[0]["step"]
    if {r["step"] for r in agreed} != {cut.step}:
        raise Broken(f"the ranks agreed on different cuts: {agreed}")

    def seals() -> list[Record]:
        # A cut at a step that is sealed already reuses that.
        return [r for r in job.of("sealed") if r["step"] == cut.step]

    job.wait_until(lambda: bool(seals()), f"seal of step {cut.step}", CUT_TIMEOUT_S)
    sealed = seals()[0]
    cut.directory = sealed["directory"]
    staged = job.await_all("staged", CUT_TIMEOUT_S, lambda r: r["directory"] == cut.directory)
    reached = {"agreed": max(r["at"] for r in agreed), "staged": max(r["at"] for r in staged),
               "durable": sealed["at"]}  # fmt: skip
    cut.seconds.update({stage: max(0.0, at - began) for stage, at in reached.items()})


def first_agreement(job: Job, cut: Cut, began: float) -> list[Record]:
    """What every rank said of the round, of this kind, that answers what was asked for then.

    That is one that was agreed on since then, or one that was not yet copied: wishes join it.
    """
    found: list[Record] = []

    def is_late(by_rank: dict[int, Record]) -> bool:
        step = by_rank[0]["step"]
        directories = {r["directory"] for r in job.of("sealed") if r["step"] == step}
        copied = [r["at"] for r in job.of("staged") if r["directory"] in directories]
        return max(*copied, *(r["at"] for r in by_rank.values())) >= began

    def is_there() -> bool:
        rounds: dict[int, dict[int, Record]] = {}
        for record in job.of("agreed"):
            if record["stop"] is cut.is_stop:
                rounds.setdefault(record["round"], {})[record["rank"]] = record
        whole = [by_rank for _, by_rank in sorted(rounds.items())
                 if len(by_rank) == job.ranks and is_late(by_rank)]  # fmt: skip
        found[:] = whole[0].values() if whole else ()
        return bool(whole)

    job.wait_until(is_there, "agreement of all ranks", CUT_TIMEOUT_S)
    return found


def check(job: Job, cut: Cut) -> None:
    """The checkpoint is whole, of all ranks, and holds the weights that they had; raises."""
    storage = open_storage(str(job.launch.path))
    reader = CheckpointReader.open(storage, cut.directory)
    ticket = reader.manifest.ticket
    if (ticket.step, ticket.world_size) != (cut.step, job.ranks):
        raise Broken(f"sealed {ticket}, expected step {cut.step} of {job.ranks} ranks")
    receipts = sorted(record.rank for record in reader.manifest.receipts)
    if receipts != list(range(job.ranks)):
        raise Broken(f"{cut.directory} has the receipts of ranks {receipts}")
    reader.verify()
    dtype = torch.float16 if "fp16" in job.launch.config else torch.bfloat16
    stored = 0
    for key in sorted(key for key in reader.tensors() if key.kind == KIND_MASTER):
        weight = torch.from_numpy(reader.read_tensor(key)).to(dtype).contiguous()
        stored = zlib.crc32(weight.view(torch.uint8).numpy(), stored)
    had = job.checksums(cut.step)
    if had != dict.fromkeys(range(job.ranks), stored):
        raise Broken(f"{cut.directory}: weights {stored}, the ranks had {had} at {cut.step}")


def send(job: Job, ranks: list[int], name: str) -> Callable[[], None]:
    """A notice by signal to these ranks."""

    def strike() -> None:
        processes = job.processes()
        for rank in ranks:
            os.kill(processes[rank], getattr(signal, name))

    return strike


def interrupt(job: Job, cut: Cut, strike: Callable[[], None], *, but: int = -1) -> float:
    """Strike, and wait until nobody is left, `but` that rank; returns when that began."""
    poller = select.poll()
    left = {os.pidfd_open(pid) for rank, pid in job.processes().items() if rank != but}
    for descriptor in left:
        poller.register(descriptor, select.POLLIN)
    began = time.monotonic()
    strike()
    end = began + CUT_TIMEOUT_S
    while left and time.monotonic() < end:
        for descriptor, _ in poller.poll(1000):
            poller.unregister(descriptor)
            left.remove(descriptor)
            os.close(descriptor)
    cut.seconds["exit"] = time.monotonic() - began
    if left:
        raise Broken(f"{len(left)} of {job.ranks} ranks are there after {CUT_TIMEOUT_S:g} s")
    cut.code = job.process.wait(CUT_TIMEOUT_S)
    job.look()
    return began


def stop_and_follow(job: Job, cut: Cut, strike: Callable[[], None]) -> None:
    """A whole stop: the notice, the end of all ranks, and what they wrote of it."""
    began = interrupt(job, cut, strike)
    heard = job.of("noticed", began)
    cut.phase = heard[0]["phase"] if heard else ""
    follow(job, cut, began)
    told = job.output.read_text().count(f"durable at step {cut.step}; leaving with {EXIT_DURABLE}")
    if told != job.ranks:
        raise Broken(f"{told} of {job.ranks} ranks said that step {cut.step} is durable")


def await_seal_by_saver(job: Job, cut: Cut, began: float) -> None:
    """For ranks that were killed: the saver seals what was staged, without them."""
    end = time.monotonic() + CUT_TIMEOUT_S
    agreed = [r for r in job.of("agreed", began) if r["stop"]]
    if not agreed:
        raise Broken("the ranks were killed before they agreed")
    cut.step = agreed[0]["step"]
    while time.monotonic() < end:
        for info in spotspeed.list_checkpoints(str(job.launch.path)):
            if info.step == cut.step:
                cut.directory = info.directory
                cut.seconds["durable"] = time.monotonic() - began
                return
        time.sleep(0.05)
    raise Broken(f"step {cut.step} was agreed on and is not sealed after {CUT_TIMEOUT_S:g} s")


def remove(folder: pathlib.Path) -> None:
    """Remove what a launch has left, in which its saver may write for a moment longer."""
    end = time.monotonic() + GONE_S
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() > end:
            raise Broken(f"{folder} is still written to after {GONE_S:g} s")
        time.sleep(0.05)


def machine() -> str:
    """The machine and the day."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    now = datetime.datetime.now(datetime.UTC).date()
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, {now}"


def write_section(path: pathlib.Path, title: str, lines: list[str]) -> None:
    """Replace the section of that title in a file of results, or add it."""
    text = path.read_text() if path.exists() else "# What the benchmarks found\n"
    before, found, after = text.partition(title)
    rest = after[after.index("\n## ") :] if found and "\n## " in after else ""
    path.write_text(before.rstrip("\n") + "\n\n" + "\n".join([title, "", *lines]) + "\n" + rest)
