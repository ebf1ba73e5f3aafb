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
from rich.table import Table

from spotspeed import __version__, cli_exchange
from spotspeed.checkpoint.catalog import CheckpointInfo, find, scan
from spotspeed.checkpoint.gc import collect
from spotspeed.checkpoint.opened import OpenedCheckpoint
from spotspeed.checkpoint.ownership import living_owner, read_epochs
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.tiers import ranks_on_node
from spotspeed.checkpoint.verify import Seen
from spotspeed.core.retention import Keep
from spotspeed.errors import CorruptionError, OwnedError, SpotSpeedError
from spotspeed.storage import open_storage

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
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]

P = ParamSpec("P")
EXIT_DAMAGED = 1
EXIT_FAILED = 3


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Errors of ours as one line on stderr and an exit code."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except CorruptionError as error:
            errors.print(f"[red]damaged:[/red] {error}")
            raise typer.Exit(EXIT_DAMAGED) from None
        except SpotSpeedError as error:
            errors.print(f"[red]{type(error).__name__}:[/red] {error}")
            raise typer.Exit(EXIT_FAILED) from None

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
    console.print(table if catalog.sealed else "no sealed checkpoint")
    for info in catalog.off_lineage:
        console.print(f"off the lineage: {info.directory}")
    for name in catalog.unsealed:
        console.print(f"unfinished: {name}")
    sealed = {info.directory for info in (*catalog.sealed, *catalog.off_lineage)}
    for name, ranks in near.items():
        if name not in sealed:
            console.print(f"level node: {name}, ranks {', '.join(map(str, ranks))} on this node")
    for damaged in catalog.damaged:
        errors.print(f"[red]damaged:[/red] {damaged.directory}: {damaged.cause}")


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
        console.print(f"{name:16} {value}")
    table = Table()
    for column in ("name", "kind", "scope", "dtype", "shape", "pieces"):
        table.add_column(column)
    for row in tensors:
        table.add_row(*(str(row[column]) for column in row))
    console.print(table)


@app.command()
@reported
def verify(path: Path, tag: Tag = None, as_json: Json = False) -> None:
    """Read every byte of one checkpoint, or of all; exit 1 and name the files if any is damaged."""
    storage = open_storage(path)
    catalog = scan(storage)
    chosen = [find(storage, tag)] if tag else [*catalog.sealed, *catalog.off_lineage]
    documents: list[dict[str, Any]] = []
    seen: Seen = {}
    for damaged in () if tag else catalog.damaged:
        documents.append({"directory": damaged.directory, "damages": [damaged.cause]})
    for info in chosen:
        with errors.status(f"reading {info.directory}, {size_text(info.size_bytes)}"):
            began = time.monotonic()
            reader = CheckpointReader.open(storage, info.directory, digest=info.digest)
            report = reader.find_damage(seen)
        documents.append({
            "directory": info.directory, "tag": info.tag, "files": report.files,
            "bytes_read": report.bytes_read, "elapsed_s": time.monotonic() - began,
            "damages": [str(damage) for damage in report.damages],
        })  # fmt: skip
    is_whole = not any(document["damages"] for document in documents)
    if as_json:
        print_json({"is_whole": is_whole, "checkpoints": documents})
    for document in () if as_json else documents:
        state = "[red]damaged[/red]" if document["damages"] else "[green]whole[/green]"
        console.print(f"{state} {document['directory']}")
        for damage in document["damages"]:
            console.print(f"  {damage}")
    if not documents:
        find(storage, tag)
    if not is_whole:
        raise typer.Exit(EXIT_DAMAGED)


@app.command()
@reported
def gc(
    path: Path,
    keep_last: Annotated[int, typer.Option(min=1, help="Newest checkpoints that stay.")] = 3,
    every_steps: Annotated[int | None, typer.Option(min=1, help="Keep one per so many.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Remove old periodic and notice checkpoints and the leftovers of crashed saves."""
    storage = open_storage(path)
    owner = living_owner(storage)
    if owner is not None and not dry_run:
        raise OwnedError(
            f"{storage.url}: a job is alive there (epoch {owner.epoch} on {owner.identity.host}, "
            f"pid {owner.identity.pid}); it removes old checkpoints by itself, as its `keep` says"
        )
    epoch = read_epochs(storage).newest
    done = collect(storage, Keep(keep_last, every_steps), epoch=epoch, dry_run=dry_run)
    if as_json:
        print_json({"dry_run": dry_run, **asdict(done)})
        return
    word = "would remove" if dry_run else "removed"
    for removal in done.removals:
        console.print(f"{word} {removal.directory}: {removal.reason}")
    for key in done.frozen:
        console.print(f"{word} {key}: no checkpoint refers to it")
    for left in done.leftovers:
        console.print(f"{word} {left}: a write that never ended has left it")
    console.print(f"{word} {len(done.removals)} directories, {size_text(done.size_bytes)}")


cli_exchange.register(app, reported)


def main() -> None:
    """Entry point of the `spotspeed` command."""
    # They register their verbs, and need this module first.
    import spotspeed.cli_certify
    import spotspeed.cli_job  # noqa: F401

    app()


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
