"""Proves that a job resumes bit for bit: trains the same steps straight and through a resume.

Three launches at a scratch path, each from the job's newest checkpoint or from nothing:

    straight   2k steps
    first      k steps, saved
    resumed    k steps more, from that checkpoint alone

Every loss of every rank, and the state after 2k steps, must be the same bits in both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spotspeed.checkpoint.catalog import find
from spotspeed.checkpoint.compare import Difference, compare
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.errors import ConfigError
from spotspeed.rehearsal import TAG, VARIABLE, Rehearsal
from spotspeed.storage import open_storage
from spotspeed.supervisor.launcher import Place, fill, free_port

Losses = Mapping[tuple[int, int, int], str]
"""The bits of each loss, in hexadecimal, by (step, micro-step, rank)."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was trained and compared, and every difference that was found."""

    command: tuple[str, ...]
    ranks: int
    first_step: int
    resumed_after_step: int
    last_step: int
    losses: int
    """Losses compared, of all ranks and micro-steps."""
    tensors: int
    size_bytes: int
    """Bytes of state compared."""
    manifest_digest: str
    """SHA-256 of the manifest of the state that the straight launch ended with."""
    differences: tuple[Difference, ...]

    @property
    def is_exact(self) -> bool:
        return not self.differences


def certify(
    command: Sequence[str], scratch: Path, *, steps: int, say: Callable[[str], None]
) -> Certificate:
    """Launch `command` three times and compare; `scratch` must be seen by all ranks.

    `steps` is k. Raises ConfigError when a launch fails or trains fewer steps than it should.
    """
    straight = Rehearsal(str(scratch / "straight"), 2 * steps, str(scratch / "losses-0"), True)
    first = Rehearsal(str(scratch / "resumed"), steps, str(scratch / "losses-1"), True)
    resumed = Rehearsal(str(scratch / "resumed"), steps, str(scratch / "losses-2"), False)
    for name, rehearsal in (("straight", straight), ("first", first), ("resumed", resumed)):
        say(f"{name}: {rehearsal.steps} steps")
        _launch(command, rehearsal)
    one, two, three = (read_log(Path(each.log)) for each in (straight, first, resumed))
    if not one.losses:
        raise ConfigError("no rank has called backward() of the engine or of a loss, so there are "
                          "no losses to compare")  # fmt: skip
    differences = _compare_losses(one.losses, two.losses, three.losses)
    ended = _ended(scratch / "straight")
    state = compare(ended, _ended(scratch / "resumed"))
    return Certificate(
        tuple(command), one.ranks, one.steps[0], one.steps[steps - 1],
        one.steps[-1], len(one.losses), state.tensors, state.size_bytes, ended.manifest.digest,
        (*differences, *state.differences),
    )  # fmt: skip


def _launch(command: Sequence[str], rehearsal: Rehearsal) -> None:
    words = fill(command, Place(None, None, free_port()))
    # What the job prints is not the document on stdout.
    done = subprocess.run(
        words, env={**os.environ, VARIABLE: rehearsal.encode()}, stdout=sys.stderr, check=False
    )
    if done.returncode:
        raise ConfigError(f"{' '.join(words)} left with {done.returncode}")
    logs = list(Path(rehearsal.log).glob("rank-*.losses"))
    if not logs:
        raise ConfigError(
            f"{' '.join(words)} ended before it began a step after {rehearsal.steps} others: let "
            f"it train longer, attach with spotspeed or run it by spotspeed.run, and give "
            f"--scratch a directory that all ranks see"
        )


@dataclass(frozen=True, slots=True)
class Log:
    """What the ranks of a launch have logged. Only the last stage of a pipeline has losses."""

    ranks: int
    steps: tuple[int, ...]
    """The updates, in order."""
    losses: Losses


def read_log(folder: Path) -> Log:
    """What a launch has left in `folder`."""
    files = sorted(folder.glob("rank-*.losses"))
    losses: dict[tuple[int, int, int], str] = {}
    steps: set[int] = set()
    for file in files:
        rank = int(file.stem.removeprefix("rank-"))
        for line in file.read_text().splitlines():
            step, *loss = line.split()
            steps.add(int(step))
            if loss:
                losses[int(step), int(loss[0]), rank] = loss[1]
    return Log(len(files), tuple(sorted(steps)), losses)


def _compare_losses(straight: Losses, first: Losses, resumed: Losses) -> list[Difference]:
    """The first loss that differs before the resume, and the first after it."""
    found: list[Difference] = []
    for name, losses, cause in (
        ("before the resume", first, "the job itself does not repeat, resumed or not"),
        ("after the resume", resumed, "the resumed job trains something else"),
    ):
        wrong = [key for key in sorted(losses) if straight.get(key) != losses[key]]
        if wrong:
            step, micro_step, rank = wrong[0]
            bits = straight.get(wrong[0], "none"), losses[wrong[0]]
            found.append(Difference(
                f"loss {name}",
                f"{len(wrong)} of {len(losses)} differ, the first at step {step}, micro-step "
                f"{micro_step}, rank {rank}: bits {bits[0]} and {bits[1]}; {cause}",
            ))  # fmt: skip
    if len(straight) != len(first) + len(resumed):
        found.append(Difference(
            "number of losses", f"{len(straight)} straight, {len(first) + len(resumed)} resumed"
        ))  # fmt: skip
    return found


def _ended(path: Path) -> CheckpointReader:
    """The checkpoint that the last launch at `path` ended with."""
    storage = open_storage(str(path))
    info = find(storage, TAG)
    return CheckpointReader.open(storage, info.directory, digest=info.digest)
