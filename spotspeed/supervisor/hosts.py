"""The hosts of a hostfile that are still there, and how many ranks they can run."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from spotspeed.config import find_block
from spotspeed.core.relaunch import Batch
from spotspeed.errors import ConfigError

SSH_PORT = 22
PROBE_TIMEOUT_S = 3.0
_LINE = re.compile(r"(?P<host>\S+)(?:\s+slots\s*=\s*(?P<slots>\d+))?\s*")


@dataclass(frozen=True, slots=True)
class Host:
    """One line of a hostfile."""

    name: str
    slots: int


def read_hostfile(path: str) -> list[Host]:
    """The hosts of a file of lines "name slots=N" (1 when missing); "#" begins a comment."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"hostfile {path}: {error.strerror}") from error
    hosts = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = _LINE.fullmatch(content)
        if match is None:
            raise ConfigError(f'hostfile {path}:{number}: {line!r} is not "name slots=N"')
        hosts.append(Host(match["host"], int(match["slots"] or 1)))
    return hosts


def write_hostfile(path: str, hosts: Sequence[Host]) -> None:
    """A hostfile that mpirun and `deepspeed` read."""
    Path(path).write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts))


def reachable(hosts: Sequence[Host], is_up: Callable[[str], bool]) -> list[Host]:
    """Those for which `is_up(name)`; all are asked at the same time."""
    if not hosts:
        return []
    with ThreadPoolExecutor(len(hosts)) as pool:
        answers = list(pool.map(lambda host: is_up(host.name), hosts))
    return [host for host, answer in zip(hosts, answers, strict=True) if answer]


def answers_ssh(name: str, port: int = SSH_PORT) -> bool:
    """Whether `name` is this machine, or accepts connections at its SSH port."""
    if name in ("localhost", "127.0.0.1", "::1", socket.gethostname()):
        return True
    try:
        socket.create_connection((name, port), PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def read_batch(path: str) -> Batch | None:
    """Global and micro batch of a DeepSpeed config; None when it does not name both.

    The micro batch is 1 where `elastic.indivisible` lets the job take smaller ones.
    """
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"DeepSpeed config {path}: {error}") from error
    train = config.get("train_batch_size")
    micro = config.get("train_micro_batch_size_per_gpu")
    if not (isinstance(train, int) and isinstance(micro, int)):
        return None
    block = find_block(config)
    is_free = block is not None and block.elastic.indivisible == "micro_batch"
    return Batch(train, 1 if is_free else micro)
