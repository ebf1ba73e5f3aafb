"""Starting the saver process of a node, and the name under which ranks find it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from spotspeed.core.saver_protocol import socket_name
from spotspeed.errors import StorageError
from spotspeed.supervised import VARIABLES

LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "MPI_LOCAL", *VARIABLES)
"""Environment by which a launcher or a supervisor recognises its processes; the saver is none of
them."""
START_TIMEOUT_S = 60.0


def rendezvous_url(url: str) -> str:
    """`url` in the one spelling by which all processes of a node find the same saver.

    A local directory becomes its absolute path without symbolic links; other URLs only lose
    slashes at the end.
    """
    path = url.removeprefix("file://")
    if "://" in path:
        return path.rstrip("/")
    return os.path.realpath(path)


def saver_address(url: str) -> str:
    """Name of the abstract socket of this user's saver for `url`."""
    return socket_name(os.getuid(), rendezvous_url(url))


def start_saver(url: str, name: str) -> None:
    """Start a saver and return once it, or a faster rival, listens at `name`.

    The process started here elects itself by binding the socket, forks the saver out of this
    process tree and leaves. Raises StorageError when it could not start.
    """
    command = [sys.executable, "-m", "spotspeed.agent", "--path", url, "--socket", name]
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=saver_environment(os.environ), cwd="/", close_fds=True, start_new_session=True,
            timeout=START_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StorageError(f"the saver process could not be started: {error}") from error
    if result.returncode != 0:
        text = result.stderr.decode(errors="replace").strip()[-2000:]
        raise StorageError(
            f"the saver process could not be started: {command} left with "
            f"{result.returncode}: {text}"
        )


def saver_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without the launcher's marks, with this package importable."""
    clean = {
        name: value for name, value in environment.items()
        if not name.startswith(LAUNCHER_PREFIXES)
    }  # fmt: skip
    root = str(Path(__file__).resolve().parents[2])
    paths = [path for path in clean.get("PYTHONPATH", "").split(os.pathsep) if path]
    clean["PYTHONPATH"] = os.pathsep.join([*paths, root])
    return clean
