"""The verbs of the command line for a job that runs: supervise, notify, emulate, doctor."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from typing import Annotated

import typer
from rich.table import Table

from spotspeed.cli import (
    Json,
    Path,
    app,
    console,
    errors,
    print_json,
    print_table,
    reported,
    size_text,
)
from spotspeed.cli_exchange import Answer, answered
from spotspeed.coordinator.notice.workplace import signal_deadline_s
from spotspeed.core.relaunch import Policy
from spotspeed.doctor import Diagnosis, diagnose
from spotspeed.supervisor.notifying import Told, notify, notify_all, paths_here, wait_durable
from spotspeed.supervisor.supervise import Plan, supervise
from spotspeed.supervisor.watching import Deadline
from spotspeed.testing.metadata import MetadataService

EXIT_NOT_DURABLE = 1
NOTICE_S = 120.0
"""What a notice leaves that says nothing of time, where nothing else is known."""
EXIT_UNFIT = 1
MAX_STATE_GB = 1e9
UNLIMITED = 1e12
"""More seconds than any job takes, more ranks than any has."""

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("supervise", context_settings=PASS_THROUGH)
@reported
def supervise_(context: typer.Context) -> None:
    """Run a launcher, give its ranks the full notice, wait until all is durable, start again."""
    plan, report = parse_supervise(context.args)
    runs = supervise(plan, _say)
    if report is not None:
        document = {"command": plan.command, "code": runs[-1].code,
                    "launches": [asdict(run) for run in runs]}  # fmt: skip
        try:
            pathlib.Path(report).write_text(json.dumps(document, indent=2) + "\n")
        except OSError as error:
            # What the job came to counts more than the report on it.
            _say(f"the report cannot be written: {error}")
    raise typer.Exit(runs[-1].code)


def _number(text: str, kind: type[int] | type[float], low: float, high: float) -> float:
    """`text` as a number from `low` to `high`; argparse names the option that it is for."""
    try:
        value = kind(text)
    except ValueError:
        value = kind(low) - 1
    if not low <= value <= high:  # Nor is nan.
        what = "a whole number" if kind is int else "a number"
        limits = f"from {low:g}" + (f" to {high:g}" if high < UNLIMITED else "")
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} {limits}")
    return value


def _whole(low: int, high: float = UNLIMITED) -> Callable[[str], float]:
    return partial(_number, kind=int, low=low, high=high)


def _seconds(low: float) -> Callable[[str], float]:
    return partial(_number, kind=float, low=low, high=UNLIMITED)


def parse_plan(words: list[str]) -> Plan:
    """What the words after `spotspeed supervise` ask to run."""
    return parse_supervise(words)[0]


def parse_supervise(words: list[str]) -> tuple[Plan, str | None]:
    """The plan and the file for the report, if any; exits with 2 when they make no sense."""
    parser = argparse.ArgumentParser(
        prog="spotspeed supervise", usage="%(prog)s [OPTION ...] -- LAUNCHER ...",
        allow_abbrev=False,
        description="Run a launcher. TERM, INT, HUP and USR1 become a notice to its ranks; a "
        "second Ctrl-C, or Ctrl-\\, ends everything now. Exit codes: 75 interrupted and durable, "
        "76 not durable, 77 do not start again, else the launcher's own.",
        epilog="{ranks}, {hostfile} and {port} in the command are filled in before each launch.",
    )  # fmt: skip
    add = parser.add_argument
    add("--relaunch", action="store_true", help="start again after 75, 76 and a kill")
    add("--max-restarts", type=_whole(0), default=10, help="at most so many (10) ...")
    add("--window", type=_seconds(0), default=3600.0, help="... within so many seconds (3600)")
    add(
        "--backoff",
        type=_seconds(0),
        default=1.0,
        help="seconds before the 2nd; doubles each time (1)",
    )
    add("--ranks", type=_whole(1), help="number of ranks, the most that {ranks} becomes")
    add("--min-ranks", type=_whole(1), default=1, help="do not run on fewer ranks (1)")
    add("--hostfile", help="lines 'name slots=N', read before each launch; hosts that answer count")
    add("--ds-config", help="choose {ranks} so that this config's global batch stays the same")
    add("--ssh-port", type=_whole(1, 65535),
        help="where hosts are asked (as ssh is configured for each)")  # fmt: skip
    add("--deadline", type=_seconds(0.1), help="seconds that a notice leaves; the ranks plan with "
        "it (the job's notice.deadline_s)")  # fmt: skip
    add("--json", metavar="FILE", help="write one JSON document there: how each launch ended "
        "(stdout is the launcher's)")  # fmt: skip
    add("--no-watch-host", action="store_true", help="leave this host's metadata service alone")
    add("command", nargs=argparse.REMAINDER, metavar="-- LAUNCHER ...", help="what to run")
    given = parser.parse_args(words)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("no launcher: spotspeed supervise -- mpirun -n 2 python train.py")
    if given.json and not _may_be_file(given.json):
        parser.error(f"--json {given.json}: is a directory or in none; name a file")
    plan = Plan(
        tuple(command), relaunch=given.relaunch,
        policy=Policy(given.max_restarts, given.window, given.backoff), ranks=given.ranks,
        min_ranks=given.min_ranks, hostfile=given.hostfile, ds_config=given.ds_config,
        deadline=Deadline(given.deadline or signal_deadline_s(os.environ, NOTICE_S),
                          is_stated=given.deadline is not None),
        watch_host=not given.no_watch_host, ssh_port=given.ssh_port,
    )  # fmt: skip
    return plan, given.json


def _may_be_file(path: str) -> bool:
    found = pathlib.Path(path)
    return found.parent.is_dir() and not found.is_dir()


def _say(line: str) -> None:
    # After SIGHUP the terminal is gone: that is when the ranks must still be told.
    with contextlib.suppress(OSError):
        errors.print(f"spotspeed supervise: {line}", markup=False, soft_wrap=True)


class Cloud(StrEnum):
    """Clouds whose metadata service can be emulated."""

    ec2 = "ec2"
    gce = "gce"
    azure = "azure"


@app.command("notify")
@reported
def notify_(
    path: Annotated[str | None, typer.Argument(help="Checkpoints of the job to tell.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every job of this user here.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it is durable.")] = False,
    deadline: Annotated[float | None, typer.Option(min=0.1, help="Seconds left.")] = None,
    timeout: Annotated[float, typer.Option(min=0, help="Longest --wait, in seconds.")] = 600.0,
    as_json: Json = False,
) -> None:
    """Tell the job on this machine that the machine goes away; with --wait, exit 1 if not durable.

    A Kubernetes preStop hook: `spotspeed notify --all --wait`.
    """
    if (path is None) is not all_:
        raise typer.BadParameter("give either the PATH of one job or --all")
    if path is not None and not path.strip():
        raise typer.BadParameter("PATH is empty: no job is told")
    if path is not None:
        told = [notify(path, seconds_left=deadline)]
    else:
        told = notify_all(paths_here(), seconds_left=deadline)

    def is_durable(job: Told) -> bool:
        return wait_durable(job, timeout_s=timeout)

    with ThreadPoolExecutor(max(1, len(told))) as pool:
        durable = list(pool.map(is_durable, told)) if wait else [None] * len(told)
    if as_json:
        print_json([{**asdict(job), "is_durable": whole}
                    for job, whole in zip(told, durable, strict=True)])  # fmt: skip
    for job, whole in () if as_json else zip(told, durable, strict=True):
        state = {None: "told", True: "durable", False: "[red]not durable[/red]"}[whole]
        console.print(f"{state}: {job.path}, launch {job.epoch}", soft_wrap=True)
    if not told:
        errors.print("no job of this user on this machine")
    if False in durable:
        raise typer.Exit(EXIT_NOT_DURABLE)


def emulate(
    cloud: Annotated[Cloud, typer.Argument(help="Whose metadata service.")],
    after: Annotated[float, typer.Option(min=0, help="Seconds until the notice.")] = 60.0,
    left: Annotated[float | None, typer.Option(min=0, help="Seconds left then (120).")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 0,
    machine: Annotated[str, typer.Option(help="The VM's name (azure).")] = "trainer-0",
) -> Answer:
    """Serve a cloud's metadata with an interruption notice, for rehearsals, until interrupted.

    The first lines on stdout, or the document, are the environment that leads a job there.
    """
    if cloud is Cloud.gce and left is not None:
        raise typer.BadParameter(
            "GCE's notice names no time: a job takes 30 s, or what its notice.deadline_s says"
        )
    left = NOTICE_S if left is None else left
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    service = MetadataService(cloud.value, host=host, port=port, machine=machine)
    environ = dict(service.environ)

    def serve() -> None:
        with service:
            if signal.sigtimedwait(signals, after) is None:
                service.announce(left)
                when = "" if cloud is Cloud.gce else f" in {left:g} s"
                errors.print(f"{cloud.value}: the machine goes away{when}")
                signal.sigwait(signals)

    lines = "\n".join(f"export {name}={value}" for name, value in environ.items())
    document = {"cloud": cloud.value, "environ": environ, "after_s": after,
                "left_s": None if cloud is Cloud.gce else left}  # fmt: skip
    return Answer(lines, document, serve)


app.command()(reported(answered(emulate)))


@app.command()
@reported
def doctor(
    path: Path,
    state_gb: Annotated[
        float | None, typer.Option(min=0, max=MAX_STATE_GB, help="Size of a checkpoint.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that share it.")] = 1,
    step_seconds: Annotated[float, typer.Option(min=0, help="Length of a step.")] = 1.0,
    local_path: Annotated[str | None, typer.Option(help="The node's own fast disk.")] = None,
    as_json: Json = False,
) -> None:
    """What this machine can do, and what a notice of 120, 30 or 15 s can save; exit 1 if unfit."""
    with errors.status("measuring"):
        state_bytes = None if state_gb is None else int(state_gb * 1e9)
        found = diagnose(path, state_bytes=state_bytes, nodes=nodes, step_s=step_seconds,
                         local_path=local_path)  # fmt: skip
    if as_json:
        print_json(found.document())
    else:
        _show(found)
    if not found.is_fit:
        raise typer.Exit(EXIT_UNFIT)


def _show(found: Diagnosis) -> None:
    colours = {"ok": "green", "note": "yellow", "bad": "red"}
    for finding in found.findings:
        colour = colours[finding.state]
        console.print(f"[{colour}]{finding.state:4}[/{colour}] {finding.what}: {finding.detail}",
                      soft_wrap=True)  # fmt: skip
    copied, written = size_text(int(found.stage_bytes_s)), size_text(int(found.write_bytes_s))
    seal = f"{1000 * found.seal_s:.1f} ms"
    console.print(f"copies {copied}/s a core, makes durable {written}/s, seals in {seal}")
    if found.near_bytes_s is not None:
        console.print(f"the node's own disk makes durable {size_text(int(found.near_bytes_s))}/s")
    table = Table(title="what a notice can save of one node")
    for name in ("notice", "at most", f"this state, {size_text(found.state_bytes)}"):
        table.add_column(name)
    for forecast in found.forecasts:
        decision = forecast.decision
        state = f"{decision.action.value}: {decision.reason}" if decision else "size not known"
        table.add_row(f"{forecast.notice_s:g} s", size_text(forecast.largest_bytes), state)
    print_table(table)
