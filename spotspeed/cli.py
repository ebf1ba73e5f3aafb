"""The command line: look at checkpoints, verify them, remove old ones."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from spotspeed import __version__, cli_exchange
from spotspeed.checkpoint.catalog import CheckpointInfo, find, scan
from spotspeed.checkpoint.opened import OpenedCheckpoint
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.tidying import Wish, tidy
from spotspeed.checkpoint.tiers import ranks_on_node
from spotspeed.checkpoint.verify import Seen
from spotspeed.errors import CorruptionError, ObjectNotFoundError, SpotSpeedError
from spotspeed.storage import Storage, open_storage
from spotspeed.storage.throttle import Throttle
from spotspeed.storage.trace import Tracer

app = typer.Typer(
    name="spotspeed", no_args_is_help=True, add_completion=False,
    help="Checkpoints for DeepSpeed training on machines that can be taken away.",
)  # fmt: skip
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

Path = Annotated[str, typer.Argument(help="Directory or fsspec URL of the checkpoints.")]
Tag = Annotated[str | None, typer.Argument(help="Tag or directory; the newest if left out.")]
Local = Annotated[
    str | None, typer.Option("--local", help="The job's `local_path`: show what this node has.")
]
LimitMb = Annotated[
    float | None,
    typer.Option("--limit-mb", min=0.001, help="Read at most so many MB (10^6 bytes) a second."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]

P = ParamSpec("P")
EXIT_DAMAGED = 1
EXIT_FAILED = 3
MAX_COLUMNS = 100_000
"""Wider tables are cut: no name in them is so long."""


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Errors as one line on stderr and an exit code, and with --json as the document on stdout."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            raise  # Whoever reads has heard enough; typer ends the process.
        except (SpotSpeedError, OSError) as error:
            is_damage = isinstance(error, CorruptionError)
            kind = type(error).__name__
            say(errors, str(error), word=f"[red]{'damaged' if is_damage else kind}:[/red]")
            if kwargs.get("as_json"):
                print_json({"error": {"kind": kind, "message": str(error)}})
            raise typer.Exit(EXIT_DAMAGED if is_damage else EXIT_FAILED) from None

    return run


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version")] = False) -> None:
    """Checkpoints for DeepSpeed training on machines that can be taken away."""
    if version:
        console.print(f"spotspeed {__version__}")
        raise typer.Exit


@app.command("list")
@reported
def list_(path: Path, local: Local = None, as_json: Json = False) -> None:
    """The checkpoints at PATH, newest first, and what is unfinished or damaged there."""
    storage = open_storage(path)
    catalog = scan(storage)
    near = ranks_on_node(local, storage.url) if local else {}
    if as_json:
        document = asdict(catalog)
        for info in (*document["sealed"], *document["off_lineage"]):
            info["level"] = "remote"
        print_json(document | ({"on_this_node": near} if local else {}))
        return
    table = Table()
    for name in ("tag", "step", "epoch", "why", "ranks", "size", "age", "level"):
        table.add_column(name, justify="left" if name in ("tag", "why") else "right")
    for info in catalog.sealed:
        table.add_row(info.tag, str(info.step), str(info.epoch), info.reason,
                      str(info.world_size), size_text(info.size_bytes), _age(info),
                      "remote, node" if info.directory in near else "remote")  # fmt: skip
    if catalog.sealed:
        print_table(table)
    else:
        console.print("no sealed checkpoint")
    for info in catalog.off_lineage:
        say(console, f"off the lineage: {info.directory}")
    lost = {damaged.directory for damaged in catalog.lost}
    for name in catalog.unsealed:
        if name not in lost:
            say(console, f"unfinished: {name}")
    sealed = {info.directory for info in (*catalog.sealed, *catalog.off_lineage)}
    for name, ranks in near.items():
        if name not in sealed:
            say(console, f"level node: {name}, ranks {', '.join(map(str, ranks))} on this node")
    for damaged in (*catalog.lost, *catalog.damaged):
        say(errors, f"{damaged.directory}: {damaged.cause}", word="[red]damaged:[/red]")


@app.command()
@reported
def show(path: Path, tag: Tag = None, local: Local = None, as_json: Json = False) -> None:
    """What one checkpoint holds: who wrote it, and every tensor by name."""
    storage = open_storage(path)
    info = find(storage, tag)
    opened = OpenedCheckpoint(CheckpointReader.open(storage, info.directory, digest=info.digest))
    tensors = [
        {"name": key.name, "kind": key.kind, "scope": key.scope, "dtype": stored.dtype,
         "shape": list(stored.shape), "pieces": len(stored.extents)}
        for key, stored in sorted(opened.reader.tensors().items())
    ]  # fmt: skip
    facts: dict[str, Any] = {**asdict(info), "level": "remote"}
    if local:
        facts["ranks_on_this_node"] = ranks_on_node(local, storage.url).get(info.directory, ())
    if as_json:
        print_json({**facts, "tensors": tensors})
        return
    for name, value in facts.items():
        say(console, f"{name:16} {value}")
    table = Table()
    for column in ("name", "kind", "scope", "dtype", "shape", "pieces"):
        table.add_column(column, overflow="fold")
    for row in tensors:
        table.add_row(*(str(row[column]) for column in row))
    print_table(table)


@app.command()
@reported
def verify(path: Path, tag: Tag = None, limit_mb: LimitMb = None, as_json: Json = False) -> None:
    """Read every byte of one checkpoint, or of all; exit 1 and name the files if any is damaged."""
    bar = _reading_bar(is_shown=not as_json)
    task = bar.add_task("", total=None)
    # Reads of shards; the small files around them are got whole, and are in nobody's sum.
    tracer = Tracer(lambda traced: bar.advance(task, traced.call.wanted_bytes))
    storage = open_storage(path, tracer, *_limit(limit_mb))
    catalog = scan(storage)
    found = [info for info in (*catalog.sealed, *catalog.off_lineage)
             if tag is None or tag in (info.tag, info.directory)]  # fmt: skip
    chosen = found if tag is None else found[:1]
    documents: list[dict[str, Any]] = []
    seen: Seen = {}
    for damaged in (*catalog.lost, *catalog.damaged):
        if tag is None or damaged.is_called(tag):
            documents.append({"directory": damaged.directory, "damages": [damaged.cause]})
    if not chosen and not documents:
        find(storage, tag)  # Raises, and says what there is instead.
    with bar:
        bar.reset(task, total=sum(info.size_bytes for info in chosen) + _object_bytes(chosen))
        for info in chosen:
            bar.update(task, description=info.directory)
            documents.append(_verified(storage, info, seen))
    is_whole = not any(document["damages"] for document in documents)
    if as_json:
        print_json({"is_whole": is_whole, "checkpoints": documents})
    for document in () if as_json else documents:
        state = "[red]damaged[/red]" if document["damages"] else "[green]whole[/green]"
        say(console, document["directory"], word=state)
        for damage in document["damages"]:
            say(console, f"  {damage}")
    if not is_whole:
        raise typer.Exit(EXIT_DAMAGED)


def _verified(storage: Storage, info: CheckpointInfo, seen: Seen) -> dict[str, Any]:
    began = time.monotonic()
    try:
        reader = CheckpointReader.open(storage, info.directory, digest=info.digest)
    except (CorruptionError, ObjectNotFoundError) as error:
        # Since it was listed: somebody has damaged or removed it meanwhile.
        return {"directory": info.directory, "tag": info.tag, "damages": [str(error)]}
    report = reader.find_damage(seen)
    return {
        "directory": info.directory, "tag": info.tag, "files": report.files,
        "bytes_read": report.bytes_read, "elapsed_s": time.monotonic() - began,
        "damages": [str(damage) for damage in report.damages],
    }  # fmt: skip


def _object_bytes(chosen: list[CheckpointInfo]) -> int:
    """About what their frozen objects have, most of which they share."""
    return max((info.object_bytes for info in chosen), default=0)


def _reading_bar(*, is_shown: bool) -> Progress:
    """A bar of bytes on stderr; none unless that is a terminal."""
    columns = ("{task.description}", BarColumn(), DownloadColumn(binary_units=True),
               TransferSpeedColumn(), TimeRemainingColumn())  # fmt: skip
    is_hidden = not (is_shown and errors.is_terminal)
    return Progress(*columns, console=errors, transient=True, disable=is_hidden)


def _limit(limit_mb: float | None) -> tuple[Throttle, ...]:
    return () if limit_mb is None else (Throttle(limit_mb * 1e6),)


@app.command()
@reported
def gc(
    path: Path,
    keep_last: Annotated[
        int | None, typer.Option(min=1, help="Newest checkpoints that stay; as the job's `keep`.")
    ] = None,
    every_steps: Annotated[
        int | None, typer.Option(min=0, help="Keep one per so many; 0: none; as the job's `keep`.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Remove old periodic and notice checkpoints and the leftovers of crashed saves."""
    tidied = tidy(open_storage(path), Wish(keep_last, every_steps, dry_run))
    done = tidied.collected
    if as_json:
        document = {"sealed": tidied.sealed, "notes": tidied.notes, "keep": asdict(tidied.keep)}
        print_json({"dry_run": dry_run, **asdict(done), **document})
        return
    word = "would remove" if dry_run else "removed"
    for name in tidied.sealed:
        say(console, f"{'would seal' if dry_run else 'sealed'} {name}: it lacks only its manifest")
    for removal in done.removals:
        say(console, f"{word} {removal.directory}: {removal.reason}")
    for key in done.frozen:
        say(console, f"{word} {key}: no checkpoint refers to it")
    for left in done.leftovers:
        say(console, f"{word} {left}: a write that never ended has left it")
    for note in tidied.notes:
        say(console, note)
    say(console, f"{word} {len(done.removals)} directories, {size_text(done.size_bytes)}")


cli_exchange.register(app, reported)


def main() -> None:
    """Entry point of the `spotspeed` command."""
    # They register their verbs, and need this module first.
    import spotspeed.cli_certify
    import spotspeed.cli_job  # noqa: F401

    app()


def say(where: Console, text: str, *, word: str = "") -> None:
    """One line, however long, and as it stands but for the markup of its first `word`."""
    where.print(f"{word} {escape(text)}" if word else escape(text), soft_wrap=True)


def print_table(table: Table) -> None:
    """A table as wide as the terminal, or, where there is none, as wide as what is in it."""
    if console.is_terminal:
        console.print(table)
        return
    wide = Console(file=console.file, width=MAX_COLUMNS, highlight=False)
    width = Measurement.get(wide, wide.options, table).maximum
    wide.print(table, width=width, crop=False)


def print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=2, sort_keys=True) + "\n")


def size_text(size_bytes: int) -> str:
    value, units = float(size_bytes), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while value >= 1024 and unit != "TiB":
        value, unit = value / 1024, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _age(info: CheckpointInfo) -> str:
    seconds = max(0, int(time.time()) - info.created_unix_s)
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
