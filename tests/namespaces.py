"""Several hosts on one machine for a test: network namespaces on a bridge, and a stand-in for ssh.

They share files, processes and the clock; each has its own name, loopback, address and abstract
sockets (so a saver of its own).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import pytest

SSH = """
import signal, socket
listener = socket.create_server(("", 22))
print("up", flush=True)
while True:
    listener.accept()[0].close()
"""
"""Where sshd would answer: who asks learns that the host is up."""


class Hosts:
    """`count` hosts while it is entered; skips the test where that is not allowed."""

    def __init__(self, count: int, folder: Path) -> None:
        mark = int.from_bytes(os.urandom(2)) % 20_000
        self._bridge = f"spb{mark}"
        self._ports = [f"{self._bridge}-{number}" for number in range(count)]
        self._names = [f"spot-{mark}-{number}" for number in range(count)]
        self._folder = folder
        self._listeners: list[subprocess.Popen[str]] = []
        self.addresses = [f"10.{77 + mark % 100}.{mark // 100}.{number + 1}"
                          for number in range(count)]  # fmt: skip

    @property
    def agent(self) -> Path:
        """A program that runs a command on a host, as `ssh HOST COMMAND` does."""
        return self._folder / "agent"

    @property
    def hostfile(self) -> Path:
        return self._folder / "hosts"

    def on(self, host: int, words: list[str]) -> list[str]:
        """The command that runs `words` on a host."""
        name = self._names[host]
        named = f'hostname {name}; exec "$@"'
        return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", named, "sh", *words]

    def yank(self, host: int) -> None:
        """Take its network away; nothing there is told, and nobody else is."""
        _ip("-n", self._names[host], "link", "set", "eth0", "down")

    def __enter__(self) -> Hosts:
        self._check_allowed()
        self._folder.mkdir(parents=True, exist_ok=True)
        self.hostfile.write_text("".join(f"{address} slots=1\n" for address in self.addresses))
        hosts = list(zip(self.addresses, self._names, strict=True))
        cases = " ".join(f"{address}) name={name};;" for address, name in hosts)
        self.agent.write_text(
            f"#!/bin/sh\nhost=$1; shift\ncase $host in {cases} *) exit 255;; esac\n"
            f'exec ip netns exec $name unshare --uts sh -c "hostname $name; $*"\n'
        )
        self.agent.chmod(0o755)
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("link", "set", self._bridge, "up")
            for number, (name, address) in enumerate(zip(self._names, self.addresses, strict=True)):
                self._add(name, self._ports[number], address)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._remove()

    def _add(self, name: str, port: str, address: str) -> None:
        _ip("netns", "add", name)
        _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", port, "master", self._bridge, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        listener = subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", SSH], stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self._listeners.append(listener)
        assert listener.stdout is not None and listener.stdout.readline() == "up\n"

    def _remove(self) -> None:
        for listener in self._listeners:
            listener.kill()
            listener.wait()
        # A namespace lives on while a process is in it; its wires must not.
        for words in (*(("link", "del", port) for port in self._ports),
                      *(("netns", "del", name) for name in self._names),
                      ("link", "del", self._bridge)):  # fmt: skip
            subprocess.run(["ip", *words], capture_output=True)

    def _check_allowed(self) -> None:
        probe = f"{self._names[0]}-probe"
        try:
            _ip("netns", "add", probe)
            _ip("-n", probe, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or str(error)
            pytest.skip(f"network namespaces are not allowed here: {reason.strip()}")
        finally:
            subprocess.run(["ip", "netns", "del", probe], capture_output=True)


def _ip(*words: str) -> None:
    """Run ip(8); raises with what it says."""
    try:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        error.add_note(f"ip {shlex.join(words)}: {error.stderr}")
        raise
