"""SLURM: SIGTERM at a preemption, another signal where `--signal` asks for one, requeued jobs.

Sources: "Preemption" and sbatch(1) of the SLURM documentation, slurm.conf(5).
"""

from __future__ import annotations

from collections.abc import Mapping

from spotspeed.coordinator.notice.contract import Workplace

KILL_WAIT_S = 30.0
"""KillWait of slurm.conf when it says nothing. GraceTime of a partition is not told to a job."""


def slurm_workplace(environ: Mapping[str, str]) -> Workplace | None:
    """The job that SLURM runs this process for; its id stays when it is requeued."""
    job = environ.get("SLURM_JOB_ID")
    if not job:
        return None
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    folder = environ.get("SLURM_SUBMIT_DIR", "").rstrip("/")
    return Workplace(
        "SLURM", f"SLURM_JOB_ID={job}, restarted {restarts} times", KILL_WAIT_S,
        ("SIGTERM", "SIGUSR1"), f"{folder}/checkpoints-{job}" if folder else "",
    )  # fmt: skip
