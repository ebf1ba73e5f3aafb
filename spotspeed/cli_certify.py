"""The verb of the command line that tells whether a job resumes bit for bit."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import typer

from spotspeed.cli import app, console, errors, print_json, reported, size_text
from spotspeed.cli_job import PASS_THROUGH
from spotspeed.supervisor.certify import Certificate, certify

EXIT_DIFFERENT = 1


@app.command("certify", context_settings=PASS_THROUGH)
@reported
def certify_(context: typer.Context) -> None:
    """Train straight and through a resume; exit 1 unless every loss and tensor is bitwise equal."""
    given = parse(context.args)
    scratch = Path(given.scratch or tempfile.mkdtemp(prefix="spotspeed-certify-", dir="."))
    scratch = scratch.absolute()
    found = certify(tuple(given.command), scratch, steps=given.steps, say=_say)
    if given.json:
        print_json({**asdict(found), "is_exact": found.is_exact})
    else:
        _show(found)
    if not found.is_exact:
        _say(f"both runs are in {scratch}")
        raise typer.Exit(EXIT_DIFFERENT)
    if not given.scratch:
        shutil.rmtree(scratch)


def parse(words: list[str]) -> argparse.Namespace:
    """What the words after `spotspeed certify` ask for; exits with 2 when they make no sense."""
    parser = argparse.ArgumentParser(
        prog="spotspeed certify", usage="%(prog)s [OPTION ...] -- LAUNCHER ...",
        allow_abbrev=False,
        description="Launch a job three times at a scratch path, from its newest checkpoint or "
        "from nothing: straight through 2K steps, K steps with a save, and K more from that. Exit "
        "code 0 when every loss and the whole state are bitwise equal, 1 when not.",
        epilog="{port} in the command becomes a free port at each launch.",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=4, metavar="K", help="steps a launch (4)")
    parser.add_argument("--scratch", help="a new directory that all ranks see; default: one here")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- LAUNCHER ...")
    given = parser.parse_args(words)
    given.command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not given.command:
        parser.error("no launcher: spotspeed certify -- mpirun -n 2 python train.py")
    if given.steps < 1:
        parser.error(f"--steps {given.steps}: at least 1")
    if given.scratch and Path(given.scratch).exists():
        parser.error(f"--scratch {given.scratch}: there is something already; name a new directory")
    return given


def _show(found: Certificate) -> None:
    console.print(" ".join(found.command), soft_wrap=True, markup=False)
    console.print(
        f"{found.ranks} ranks, steps {found.first_step} to {found.last_step}, resumed after "
        f"{found.resumed_after_step}: {found.losses} losses, {found.tensors} tensors with "
        f"{size_text(found.size_bytes)}"
    )
    for difference in found.differences:
        console.print(f"[red]differs:[/red] {difference.what}: {difference.how}", soft_wrap=True)
    if found.is_exact:
        console.print(f"[green]bitwise equal[/green]; state {found.manifest_digest}")


def _say(line: str) -> None:
    errors.print(f"spotspeed certify: {line}", markup=False, soft_wrap=True)
