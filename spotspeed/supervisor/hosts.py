"""The hosts of a hostfile that are still there, and how many ranks they can run."""

from __future__ import annotations

import json
import re
import socket
import subprocess
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


def answers_ssh(name: str, port: int | None = None) -> bool:
    """Whether `name` is this machine, or accepts connections at its SSH port.

    `port` None: what ssh's own configuration has for that name, which may be an alias.
    """
    address, port = (name, port) if port is not None else _ssh_target(name)
    if is_here(address):
        return True
    try:
        socket.create_connection((address, port), PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def is_here(name: str) -> bool:
    """Whether `name`, a host's name or address, is this machine: one of its own addresses."""
    return name == socket.gethostname() or any(map(_is_own, addresses(name)))


def addresses(name: str) -> set[str]:
    """The addresses of a host; none when its name is not known."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
    except OSError:
        return set()
    return {str(address[0]) for *_, address in found}


def _is_own(address: str) -> bool:
    """Only an address of this machine can be bound to."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _ssh_target(name: str) -> tuple[str, int]:
    """Address and port that ssh would connect to; without ssh, `name` and 22."""
    try:
        done = subprocess.run(["ssh", "-G", "--", name], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=PROBE_TIMEOUT_S,
                              check=True)  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return name, SSH_PORT
    options = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    return options.get("hostname", name), int(options.get("port", SSH_PORT))


def new_master(master: str | None, hosts: Sequence[Host], left: Sequence[Host]) -> str | None:
    """What MASTER_ADDR shall be: the first host left, where `master` names one that is gone.

    None: as it is.
    """
    living = {host.name for host in left}
    gone = {host.name for host in hosts} - living
    if master is None or master in living or not left:
        return None
    own = addresses(master)
    is_gone = master in gone or any(not own.isdisjoint(addresses(name)) for name in gone)
    return left[0].name if is_gone else None


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
