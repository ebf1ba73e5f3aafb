"""One rank that stages known tensors through the real saver, told what to do line by line.

`saver_rank.py PATH RANK WORLD [HOST_MEMORY_GB|- [LOCAL_PATH]]` answers each JSON line on stdin with
one on stdout.
`saver_rank.py PATH --hang DIRECTORY` takes its rank from the launcher's environment, stages one
save, leaves a file in DIRECTORY, and waits to be killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from spotspeed import events
from spotspeed.checkpoint.ownership import claim_epoch
from spotspeed.config import parse_block
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket
from spotspeed.errors import SpotSpeedError
from spotspeed.staging.staged import StagedSave
from spotspeed.staging.stager import Stager
from spotspeed.storage.local import LocalStorage

Pieces = list[tuple[Fragment, torch.Tensor]]


def pieces_of(step: int, rank: int, count: int, elements: int) -> Pieces:
    """Tensors whose every element says what step, rank and place it is from."""
    result: Pieces = []
    for number in range(count):
        key = TensorKey("fp32", f"layer.{number}", f"rank-{rank}")
        tensor = torch.arange(elements, dtype=torch.float32) + (step * 7 + rank * 3 + number)
        result.append((Fragment(key, "float32", (elements,), Interval(0, elements)), tensor))
    return result


def ticket_of(step: int, world_size: int, *, epoch: int = 1, reason: str = "explicit") -> Ticket:
    return Ticket(epoch, step, "a", f"step-{step}", reason, world_size, 1_700_000_000)


class Rank:
    """Executes the lines."""

    def __init__(
        self, path: str, rank: int, world_size: int, host_memory_gb: float | None,
        local_path: str | None = None,
    ) -> None:  # fmt: skip
        config = parse_block({
            "path": path, "local_path": local_path, "staging": {"host_memory_gb": host_memory_gb}
        })  # fmt: skip
        self.rank, self.world_size = rank, world_size
        self.stager = Stager(path, config, rank)
        self.saves: dict[int, StagedSave] = {}
        self.pieces: dict[int, Pieces] = {}
        self.events: list[str] = []
        events.add_sink(lambda event: self.events.append(event.describe()))

    def reserve(self, size_bytes: int) -> dict[str, Any]:
        self.stager.reserve(size_bytes)
        return self.facts()

    def facts(self) -> dict[str, Any]:
        session = self.stager._session
        assert session is not None
        return {"saver_pid": session.saver_pid, "slots": session.pool.slot_count,
                "free": session.pool.free_count, "arena_bytes": session.arena_bytes,
                "events": self.events}  # fmt: skip

    def stage(
        self, step: int, count: int, elements: int, epoch: int = 1, reason: str = "explicit"
    ) -> dict[str, Any]:
        self.pieces[step] = pieces_of(step, self.rank, count, elements)
        blobs = {TensorKey("blob", "rank", f"rank-{self.rank}"): b"rank state"}
        ticket = ticket_of(step, self.world_size, epoch=epoch, reason=reason)
        self.saves[step] = self.stager.stage(ticket, self.pieces[step], blobs)
        return {"directory": ticket.directory, "bytes": self.saves[step].size_bytes}

    def wait_full(self) -> dict[str, Any]:
        """Wait until staging stands still because every slot is taken."""
        session = self.stager._session
        assert session is not None
        deadline = time.monotonic() + 30
        while session.pool.free_count and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.facts()

    def wait_staged(self, step: int, timeout_s: float = 60.0) -> dict[str, Any]:
        is_staged = self.saves[step].wait_staged(timeout_s)
        facts = self.saves[step].staging_completion.result(0)
        return {"staged": is_staged, "stalled_s": facts.stalled_s}

    def result(self, step: int, timeout_s: float = 60.0) -> dict[str, Any]:
        manifest = self.saves[step].upload_completion.result(timeout_s)
        return {"digest": manifest.digest, "directory": manifest.ticket.directory}

    def wait_level(self, step: int, level: str) -> dict[str, Any]:
        """Wait until this rank's part has come so far or further, or has failed."""
        levels = [None, "process", "node", "remote"]
        save, deadline = self.saves[step], time.monotonic() + 60
        while levels.index(save.level) < levels.index(level) and time.monotonic() < deadline:
            if save.upload_completion.done() and save.upload_completion.exception() is not None:
                break
            time.sleep(0.005)
        return {"level": save.level}

    def drain(self, before_epoch: int, timeout_s: float = 60.0) -> dict[str, Any]:
        """As an attach does: have what was left on this node written first."""
        drained = self.stager.drain(before_epoch, timeout_s=timeout_s)
        assert drained is not None
        return {"sealed": drained.sealed, "stored": drained.stored, "failed": drained.failed}

    def stored(self, step: int, timeout_s: float = 60.0) -> dict[str, Any]:
        self.saves[step].stored_completion.result(timeout_s)
        return {}

    def abandon(self, step: int) -> dict[str, Any]:
        self.saves[step].abandon("the test says so")
        return {}

    def claim(self) -> dict[str, Any]:
        """Claim the path as the next epoch, and leave its renewal to the saver."""
        epoch = claim_epoch(LocalStorage(self.stager.url), period_s=0.05).epoch
        self.stager.renew_owner(epoch, period_s=0.05)
        return {"epoch": epoch}

    def fork_child(self) -> dict[str, Any]:
        """A child that keeps everything open, as a DataLoader worker does."""
        child = os.fork()
        if child == 0:
            while True:
                signal.pause()
        return {"child": child}

    def close(self) -> dict[str, Any]:
        self.stager.close()
        return {}


def converse(rank: Rank) -> None:
    for line in sys.stdin:
        command = json.loads(line)
        action = getattr(rank, command.pop("do"))
        try:
            answer = action(**command)
        except SpotSpeedError as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(answer), flush=True)


def hang(path: str, directory: str) -> None:
    """Stage while the saver stands still, so that all of its work is left when the rank dies."""
    rank = int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))
    world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", "1")))
    actor, place = Rank(path, rank, world_size, None), Path(directory)
    saver = actor.reserve(1 << 20)["saver_pid"]
    (place / f"reserved-{rank}").write_text(str(saver))
    deadline = time.monotonic() + 60
    while len(list(place.glob("reserved-*"))) < world_size and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(saver, signal.SIGSTOP)
    actor.stage(step=5, count=4, elements=1 << 16)
    actor.wait_staged(step=5)
    (place / f"new-{rank}").write_text(f"{os.getpid()} {saver}")
    (place / f"new-{rank}").rename(place / f"staged-{rank}")
    while True:
        signal.pause()


if __name__ == "__main__":
    if "--hang" in sys.argv:
        place = sys.argv.index("--hang")
        hang(sys.argv[place - 1], sys.argv[place + 1])
    else:
        given = [*sys.argv[4:6], *("-", "")[len(sys.argv[4:6]) :]]
        memory = None if given[0] == "-" else float(given[0])
        converse(Rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), memory, given[1] or None))
