"""The verbs of the command line for a job that runs: supervise, notify, emulate, doctor."""

from __future__ import annotations

import argparse

import typer

from spotspeed.cli import app, errors, reported
from spotspeed.core.relaunch import Policy
from spotspeed.supervisor.supervise import Plan, supervise

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("supervise", context_settings=PASS_THROUGH)
@reported
def supervise_(context: typer.Context) -> None:
    """Run a launcher, give its ranks the full notice, wait until all is durable, start again."""
    raise typer.Exit(supervise(parse_plan(context.args), _say))


def parse_plan(words: list[str]) -> Plan:
    """What the words after `spotspeed supervise` ask for; exits with 2 when they make no sense."""
    parser = argparse.ArgumentParser(
        prog="spotspeed supervise", usage="%(prog)s [OPTION ...] -- LAUNCHER ...",
        allow_abbrev=False,
        description="Run a launcher. TERM, INT, HUP and USR1 become a notice to its ranks; a "
        "second Ctrl-C ends everything now. Exit codes: 75 interrupted and durable, 76 not "
        "durable, 77 do not start again, else the launcher's own.",
        epilog="{ranks}, {hostfile} and {port} in the command are filled in before each launch.",
    )  # fmt: skip
    add = parser.add_argument
    add("--relaunch", action="store_true", help="start again after 75, 76 and a kill")
    add("--max-restarts", type=int, default=10, help="at most so many (10) ...")
    add("--window", type=float, default=3600.0, help="... within so many seconds (3600)")
    add("--backoff", type=float, default=1.0, help="seconds before the 2nd; doubles each time (1)")
    add("--ranks", type=int, help="number of ranks, the most that {ranks} becomes")
    add("--min-ranks", type=int, default=1, help="do not run on fewer ranks (1)")
    add("--hostfile", help="lines 'name slots=N', read before each launch; hosts that answer count")
    add("--ds-config", help="choose {ranks} so that this config's global batch stays the same")
    add("--deadline", type=float, default=120.0, help="seconds that a notice leaves (120)")
    add("--no-watch-host", action="store_true", help="leave this host's metadata service alone")
    add("command", nargs=argparse.REMAINDER, metavar="-- LAUNCHER ...", help="what to run")
    given = parser.parse_args(words)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("no launcher: spotspeed supervise -- mpirun -n 2 python train.py")
    return Plan(
        tuple(command), relaunch=given.relaunch,
        policy=Policy(given.max_restarts, given.window, given.backoff), ranks=given.ranks,
        min_ranks=given.min_ranks, hostfile=given.hostfile, ds_config=given.ds_config,
        deadline_s=given.deadline, watch_host=not given.no_watch_host,
    )  # fmt: skip


def _say(line: str) -> None:
    errors.print(f"spotspeed supervise: {line}", markup=False, soft_wrap=True)
