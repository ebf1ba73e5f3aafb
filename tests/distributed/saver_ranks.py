"""Rank processes that a test drives line by line, and what it may look at afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spotspeed.checkpoint.catalog import list_sealed
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.storage.local import LocalStorage
from tests.distributed.drivers.saver_rank import pieces_of
from tests.ranks import ROOT, free_port, rank_environment

DRIVER = ROOT / "tests" / "distributed" / "drivers" / "saver_rank.py"
LIMIT_S = 60.0


class RankProcess:
    """One running rank; killed when the block ends."""

    def __init__(
        self, path: Path, rank: int = 0, world_size: int = 1, *,
        host_memory_gb: float | None = None, prefix: Sequence[str] = (),
        local_path: Path | None = None,
    ) -> None:  # fmt: skip
        command = [*prefix, sys.executable, str(DRIVER), str(path), str(rank), str(world_size)]
        command += ["-" if host_memory_gb is None else str(host_memory_gb)]
        command += [] if local_path is None else [str(local_path)]
        environment = rank_environment(free_port(), {"PYTHONPATH": str(ROOT)})
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> RankProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()

    def tell(self, do: str, **arguments: Any) -> None:
        """Send a command without waiting for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The answer to the oldest command; the rank is killed when it takes too long."""
        assert self.process.stdout is not None
        watchdog = threading.Timer(LIMIT_S, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        assert line, f"the rank ended with {self.process.wait(LIMIT_S)}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and return its answer."""
        self.tell(do, **arguments)
        return self.answer()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(LIMIT_S)


def wait_gone(pid: int, timeout_s: float = LIMIT_S) -> None:
    """Return when process `pid`, not necessarily a child, has ended; fail after `timeout_s`."""
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            import select

            poller = select.poll()
            poller.register(process, select.POLLIN)
            assert poller.poll(timeout_s * 1000), f"process {pid} still runs after {timeout_s} s"
        finally:
            os.close(process)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Process `pid` does not run inside the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def check_sealed(path: Path, step: int, *, world_size: int, count: int, elements: int) -> None:
    """The newest checkpoint at `path` is that of `step`, verifies, and holds the right bytes."""
    storage = LocalStorage(path)
    newest = list_sealed(storage)[0]
    assert newest.step == step
    reader = CheckpointReader.open(storage, newest.directory, digest=newest.digest)
    assert reader.verify().is_whole
    for rank in range(world_size):
        expected = pieces_of(step, rank, count, elements)
        read = [(fragment, bytearray(fragment.size_bytes)) for fragment, _ in expected]
        reader.read_into(read)
        for (fragment, tensor), (_, data) in zip(expected, read, strict=True):
            assert bytes(data) == tensor.numpy().tobytes(), fragment.key
