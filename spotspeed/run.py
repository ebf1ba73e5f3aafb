"""Run a DeepSpeed script that knows nothing of spotspeed, with checkpoints and interruptions.

    deepspeed --module spotspeed.run train.py ...      torchrun -m spotspeed.run train.py ...
    mpirun ... python -m spotspeed.run train.py ...    accelerate launch -m spotspeed.run train.py

Installs the engine hooks, then runs the script as if Python had been given it directly. Without a
"spotspeed" block in the script's DeepSpeed config nothing else happens.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

from spotspeed.errors import ConfigError
from spotspeed.exit import EXIT_DO_NOT_REQUEUE, NO_REQUEUE_ERRORS

EXIT_USAGE = 2
_LOCAL_RANK = "--local_rank"
_MPI_NAMES = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
}


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


def export_ranks(environment: MutableMapping[str, str]) -> None:
    """Fill RANK, WORLD_SIZE and LOCAL_RANK from what an MPI launcher has set, where absent.

    torch.distributed's own variables need an address too: with one host it is the loopback, else
    MASTER_ADDR must be exported by the launcher, as torch.distributed itself requires.
    """
    found = {
        name: next((environment[source] for source in sources if source in environment), None)
        for name, sources in _MPI_NAMES.items()
    }
    if "RANK" in environment or None in (found["RANK"], found["WORLD_SIZE"]):
        return
    local_size = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    if "MASTER_ADDR" not in environment:
        if local_size is None or local_size != found["WORLD_SIZE"]:
            return
        environment["MASTER_ADDR"] = "127.0.0.1"
    environment.setdefault("MASTER_PORT", "29500")
    environment.update({name: value for name, value in found.items() if value is not None})
    environment.setdefault("LOCAL_RANK", "0")


def main(words: Sequence[str] | None = None) -> None:
    """Run the target; exits with the script's own code, or 77 when it must not be requeued."""
    try:
        target = parse(sys.argv[1:] if words is None else words)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(EXIT_USAGE) from None
    export_ranks(os.environ)
    from spotspeed.launch import install

    install()
    sys.argv = [target.name, *target.arguments]
    try:
        if target.is_module:
            sys.path[0] = os.getcwd()
            runpy.run_module(target.name, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(target.name))
            runpy.run_path(target.name, run_name="__main__")
    except NO_REQUEUE_ERRORS:
        traceback.print_exc()
        sys.stderr.flush()
        raise SystemExit(EXIT_DO_NOT_REQUEUE) from None


if __name__ == "__main__":
    main()
