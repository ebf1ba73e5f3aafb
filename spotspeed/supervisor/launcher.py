"""One launch: its command line, a session of its own, and how it is told to leave."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spotspeed.errors import ConfigError

FORWARDERS = frozenset({"mpirun", "mpiexec", "orterun", "prterun", "mpiexec.hydra", "srun"})
"""Launchers that pass SIGUSR1 on to ranks on other hosts, and live."""
_PORT_OPTIONS = {"deepspeed": "--master_port", "torchrun": "--master-port"}
"""Launchers that choose the port by an option instead of by MASTER_PORT."""
_OTHER_RENDEZVOUS = ("--standalone", "--rdzv")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a launch runs; None leaves the command as it is."""

    ranks: int | None = None
    hostfile: str | None = None
    port: int | None = None
    master: str | None = None
    """The MASTER_ADDR instead of the one in the environment."""


def launcher_name(command: Sequence[str]) -> str:
    """What kind of launcher a command line starts, by the name of its program."""
    return Path(command[0]).name


def fill(command: Sequence[str], place: Place) -> list[str]:
    """The command line with {ranks}, {hostfile} and {port} replaced by what `place` says.

    `deepspeed` and torchrun get the port as an option where the command names none. Raises
    ConfigError for a placeholder that has no value.
    """
    known = {"{ranks}": place.ranks, "{hostfile}": place.hostfile, "{port}": place.port}
    words = []
    for word in command:
        for placeholder, value in known.items():
            if placeholder in word and value is None:
                raise ConfigError(f"{word!r}: nothing is known to put in the place of "
                                  f"{placeholder}; give --hostfile or --ranks")  # fmt: skip
            word = word.replace(placeholder, str(value))
        words.append(word)
    option = _PORT_OPTIONS.get(launcher_name(command))
    names = [word.partition("=")[0].replace("-", "_") for word in words]
    if place.port is None or option is None or option.replace("-", "_") in names:
        return words
    if any(word.startswith(_OTHER_RENDEZVOUS) for word in words):
        return words
    return [words[0], f"{option}={place.port}", *words[1:]]


def free_port() -> int:
    """A TCP port that nobody on this machine listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class Launch:
    """A launcher that has been started; it leads a session of its own.

    Signals to the supervisor's process group, Ctrl-C among them, do not reach it. stdin, stdout
    and stderr are the supervisor's own.
    """

    def __init__(self, words: Sequence[str], environ: Mapping[str, str], mask: set[int]) -> None:
        try:
            self.pid = os.posix_spawnp(
                words[0], list(words), dict(environ), setsid=True, setsigmask=mask,
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
            )  # fmt: skip
        except OSError as error:
            raise ConfigError(f"{words[0]!r} cannot be started: {error.strerror}") from error
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, 128 + n after signal n, or None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self._code = code if code >= 0 else 128 - code
        return self._code

    def send(self, number: int) -> None:
        """Signal the launcher itself, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)
