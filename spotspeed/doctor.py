"""What this machine can do for a job: what is there, how fast the store is, what a notice saves.

Everything is measured or looked up now; the store is written to for about a second.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal

from spotspeed.build_locks import abandoned_locks, filesystem_of
from spotspeed.checkpoint.catalog import scan
from spotspeed.checkpoint.measuring import measure_copy, measure_store
from spotspeed.checkpoint.ownership import read_owner
from spotspeed.coordinator.notice.detect import find_platform
from spotspeed.coordinator.notice.workplace import find_workplace
from spotspeed.core.deadline import (
    NOTICES_S,
    Decision,
    Limits,
    Measured,
    Pace,
    Places,
    choose,
    largest_durable_bytes,
)
from spotspeed.staging.pool import available_memory_bytes
from spotspeed.storage import open_storage
from spotspeed.storage.contract import Storage

SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "fuse", "9p", "glusterfs")
"""File systems that usually outlive a machine."""

State = Literal["ok", "note", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: State
    detail: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a notice of `notice_s` seconds can save of one node."""

    notice_s: float
    largest_bytes: int
    decision: Decision | None
    """For the state that was asked about; None when its size is not known."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was found; speeds in bytes per second."""

    findings: tuple[Finding, ...]
    stage_bytes_s: float
    write_bytes_s: float
    seal_s: float
    near_bytes_s: float | None
    """How fast the node's own disk makes bytes durable; None when none was asked about."""
    state_bytes: int
    """Of one node; 0 when not known."""
    forecasts: tuple[Forecast, ...]

    @property
    def is_fit(self) -> bool:
        """Whether a job can be checkpointed here."""
        return not any(finding.state == "bad" for finding in self.findings)

    def document(self) -> dict[str, Any]:
        """The same as plain data for JSON; a time that never comes is null."""
        decisions = [forecast.decision for forecast in self.forecasts]
        return {
            "is_fit": self.is_fit, "stage_bytes_s": self.stage_bytes_s,
            "write_bytes_s": self.write_bytes_s, "seal_s": self.seal_s,
            "near_bytes_s": self.near_bytes_s, "state_bytes": self.state_bytes,
            "findings": [asdict(finding) for finding in self.findings],
            "forecasts": [
                {"notice_s": forecast.notice_s, "largest_bytes": forecast.largest_bytes,
                 "action": decision.action.value if decision else None,
                 "done_s": decision.done_s if decision and decision.done_s < inf else None,
                 "reason": decision.reason if decision else "the size of the state is not known"}
                for forecast, decision in zip(self.forecasts, decisions, strict=True)
            ],
        }  # fmt: skip


def diagnose(
    path: str, *, state_bytes: int | None = None, nodes: int = 1, step_s: float = 1.0,
    local_path: str | None = None,
) -> Diagnosis:  # fmt: skip
    """Look at this machine, at the store at `path`, and at the node's own disk at `local_path`.

    `state_bytes` of the whole job, by default those of the newest checkpoint there, are divided
    among `nodes`; `step_s` is how long a step takes. Raises StorageError when the store cannot be
    written.
    """
    storage = open_storage(path)
    findings = [*_software(), *_machine(os.environ), *_place(storage)]
    write_bytes_s, seal_s = measure_store(storage)
    stage_bytes_s = measure_copy()
    if state_bytes is None:
        sealed = scan(storage).sealed
        state_bytes = sealed[0].size_bytes if sealed else 0
    share = state_bytes // nodes
    measured = Measured(share, stage_bytes_s, step_s=step_s)
    near = None if local_path is None else Pace(measure_store(open_storage(local_path))[0])
    places = Places(storage.url, Pace(write_bytes_s), seal_s, near)
    forecasts = tuple(
        Forecast(
            seconds, largest_durable_bytes(Limits(cloud_s=seconds), measured, places),
            choose(Limits(cloud_s=seconds), measured, places)[0] if share else None,
        )
        for seconds in NOTICES_S
    )  # fmt: skip
    near_bytes_s = None if near is None else near.write_bytes_s
    return Diagnosis(
        tuple(findings), stage_bytes_s, write_bytes_s, seal_s, near_bytes_s, share, forecasts
    )


def _software() -> Iterator[Finding]:
    has_native = importlib.util.find_spec("spotspeed._native") is not None
    yield Finding("native extension", "ok" if has_native else "bad",
                  "built" if has_native else "missing: pip install spotspeed again")  # fmt: skip
    for package in ("torch", "deepspeed", "mpi4py"):
        try:
            yield Finding(package, "ok", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, "note" if package == "mpi4py" else "bad", "not installed")
    known = ("deepspeed", "torchrun", "mpirun", "srun")
    places = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    found = [name for name in known if shutil.which(name, path=places)]
    yield Finding("launchers", "ok" if found else "note", ", ".join(found) or "none found")


def _machine(environ: Mapping[str, str]) -> Iterator[Finding]:
    yield Finding("cores", "ok", str(len(os.sched_getaffinity(0))))
    yield Finding("memory for staging", "ok", f"{available_memory_bytes() / 1e9:.1f} GB available")
    cloud = find_platform(environ)
    none = "no metadata service found: signals, a file, or `spotspeed notify`"
    yield Finding("notices of a cloud", "ok" if cloud else "note", cloud or none)
    place = find_workplace(environ)
    if place is not None:
        grace = "an unknown time" if place.grace_s is None else f"{place.grace_s:g} s"
        yield Finding("runs under", "ok", f"{place.name} ({place.why}): SIGKILL {grace} after its "
                      f"signal; `notice.deadline_s` replaces that")  # fmt: skip
    for lock in abandoned_locks(environ):
        yield Finding("operator build", "bad",
                      f"{lock.path} is left over from a build that was killed; "
                      f"remove it")  # fmt: skip


def _place(storage: Storage) -> Iterator[Finding]:
    if "://" in storage.url:
        yield Finding("store", "ok", storage.url)
    else:
        kind = filesystem_of(storage.url)
        is_shared = kind.startswith(SHARED)
        yield Finding("store", "ok" if is_shared else "note",
                      f"{storage.url} on {kind}" + ("" if is_shared else
                      ": does it survive the machine, and do all ranks see it?"))  # fmt: skip
    yield Finding("conditional create", "ok" if storage.has_atomic_create else "note",
                  "atomic" if storage.has_atomic_create else
                  "emulated: two jobs that start at one moment may not see each other")  # fmt: skip
    owner = read_owner(storage)
    if owner is not None and owner.state == "training":
        yield Finding("owner", "note",
                      f"epoch {owner.epoch} on {owner.identity.host} was training")  # fmt: skip
