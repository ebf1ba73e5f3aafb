"""A file whose appearance is a notice; its first line may say how many seconds are left."""

from __future__ import annotations

import logging
import math
import os
import time
from pathlib import Path

from spotspeed.coordinator.notice.contract import Notice
from spotspeed.coordinator.notice.watch import LookError, Sighting, Watch

_logger = logging.getLogger("spotspeed")

_PERIOD_S = 0.5
_READ_BYTES = 256


def file_source(path: str | os.PathLike[str], *, period_s: float = _PERIOD_S) -> Watch:
    """Watches for `path`, which may be on a network file system (it is polled).

    A file that is older than this process is left over from an earlier notice: it is logged and
    ignored until it is written anew, or else every requeued job would leave at once. The file may
    be empty (`notice.deadline_s` applies) or begin with a number of seconds.
    """
    return Watch("file", _FileLook(Path(path), process_started_s()), period_s=period_s)


class _FileLook:
    def __init__(self, path: Path, started_s: float) -> None:
        self._path = path
        self._started_s = started_s
        self._stale: str | None = None
        self._is_first = True

    def __call__(self, stop_fd: int) -> list[Sighting]:
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                head = file.read(_READ_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            self._is_first = False
            return []
        except OSError as error:
            raise LookError(f"{self._path}: {error.strerror}") from error
        key = f"{status.st_dev}/{status.st_ino}/{status.st_mtime_ns}"
        if self._is_first and status.st_mtime < self._started_s:
            self._stale = key
            _logger.warning("%s is older than this process: not a notice", self._path)
        self._is_first = False
        if key == self._stale:
            return []
        return [Sighting(key, Notice("file", _seconds_left(head), stop=True))]


def process_started_s() -> float:
    """When this process began, as wall time."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    after_boot_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - after_boot_s)


def _seconds_left(head: bytes) -> float | None:
    try:
        seconds = float(head.split(maxsplit=1)[0])
    except (IndexError, ValueError):
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
