"""Run a DeepSpeed script that knows nothing of spotspeed, with checkpoints and interruptions.

    deepspeed --module spotspeed.run train.py ...      torchrun -m spotspeed.run train.py ...
    mpirun ... python -m spotspeed.run train.py ...    accelerate launch -m spotspeed.run train.py

Installs the engine hooks, then runs the script as if Python had been given it directly. Without a
"spotspeed" block in the script's DeepSpeed config nothing else happens.
"""

from __future__ import annotations

import os
import sys
import traceback
import zlib
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

from spotspeed.errors import ConfigError
from spotspeed.exit import EXIT_DO_NOT_REQUEUE, NO_REQUEUE_ERRORS
from spotspeed.mainprogram import run_module, run_script

EXIT_USAGE = 2
_LOCAL_RANK = "--local_rank"
_MPI_NAMES = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
}

_JOB_NAMES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "SLURM_JOB_ID")
"""What names one launch, the same on all its ranks."""
_DEFAULT_PORT, _FIRST_PORT, _PORT_COUNT = 29500, 20000, 12000


@dataclass(frozen=True, slots=True)
class Target:
    """What to run: a script's path or, after -m, a module's name; and its arguments."""

    name: str
    is_module: bool
    arguments: tuple[str, ...]


def parse(words: Sequence[str]) -> Target:
    """The target of a command line; raises ConfigError when there is none.

    The `deepspeed` launcher puts `--local_rank=N` before the script's name; scripts expect it
    among their own arguments, so it is moved there.
    """
    moved: list[str] = []
    rest = list(words)
    while rest and rest[0].startswith(("--local_rank", "--local-rank")):
        word = rest.pop(0)
        moved.append(word if "=" in word else f"{word}={rest.pop(0)}" if rest else word)
    is_module = bool(rest) and rest[0] == "-m"
    if is_module:
        rest.pop(0)
    if not rest or rest[0].startswith("-"):
        raise ConfigError(
            "spotspeed.run needs a script: python -m spotspeed.run [-m] SCRIPT [ARGUMENT ...]"
        )
    return Target(rest[0], is_module, (*moved, *rest[1:]))


def export_ranks(environment: MutableMapping[str, str]) -> str | None:
    """Fill RANK, WORLD_SIZE and LOCAL_RANK from what an MPI launcher has set, where absent.

    torch.distributed needs MASTER_ADDR and MASTER_PORT, too. With one host the address is the
    loopback. The port follows from the job's name, so that the ranks agree on it and two jobs of a
    host do not collide. Returns what the user has to set for himself, if anything.
    """
    found = {
        name: next((environment[source] for source in sources if source in environment), None)
        for name, sources in _MPI_NAMES.items()
    }
    if "RANK" in environment or None in (found["RANK"], found["WORLD_SIZE"]):
        return None
    environment.update({name: value for name, value in found.items() if value is not None})
    environment.setdefault("LOCAL_RANK", "0")
    job = next((environment[name] for name in _JOB_NAMES if name in environment), None)
    environment.setdefault("MASTER_PORT", str(_DEFAULT_PORT if job is None else port_of(job)))
    local_size = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", environment.get("MPI_LOCALNRANKS"))
    if "MASTER_ADDR" not in environment and local_size == found["WORLD_SIZE"]:
        environment["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_ADDR" in environment or found["RANK"] != "0":
        return None
    return (
        "MASTER_ADDR is not set and the ranks are, or may be, on several hosts: export the address "
        "of rank 0's host to all of them (with Open MPI: mpirun -x MASTER_ADDR=HOST). Without it "
        "only DeepSpeed's own start-up through mpi4py can connect them"
    )


def port_of(job: str) -> int:
    """A port below those that Linux hands out by itself, the same for the same job."""
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORT_COUNT


def main(words: Sequence[str] | None = None) -> None:
    """Run the target; exits with the script's own code, or 77 when it must not be requeued."""
    try:
        target = parse(sys.argv[1:] if words is None else words)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(EXIT_USAGE) from None
    missing = export_ranks(os.environ)
    if missing is not None:
        sys.stderr.write(f"spotspeed.run: {missing}\n")
    from spotspeed.launch import install

    install()
    try:
        run = run_module if target.is_module else run_script
        run(target.name, target.arguments)
    except NO_REQUEUE_ERRORS:
        traceback.print_exc()
        sys.stderr.flush()
        raise SystemExit(EXIT_DO_NOT_REQUEUE) from None


if __name__ == "__main__":
    main()
