"""The commands that exchange checkpoints with other tools or compare two of them."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import wraps
from typing import Annotated, Any

import typer

from spotspeed.checkpoint.catalog import find
from spotspeed.checkpoint.compare import compare
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.safetensors import export_safetensors
from spotspeed.core.manifest import MAX_WORLD_SIZE
from spotspeed.errors import ConfigError
from spotspeed.storage import open_storage

Places = Annotated[list[str], typer.Argument(
    metavar="PATH [TAG] OUT", help="The checkpoints, one of them (else the newest), what to make."
)]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command has done: a line for people, and the same for programs.

    `rest` is what it goes on to do when that has been said.
    """

    text: str
    document: dict[str, Any]
    rest: Callable[[], None] | None = None


class Target(StrEnum):
    """What an export can make."""

    SAFETENSORS = "safetensors"
    DEEPSPEED = "deepspeed"


class Precision(StrEnum):
    """Floating-point types that weights can be rounded to."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


_DTYPES = {Precision.BF16: "bfloat16", Precision.FP16: "float16", Precision.FP32: "float32"}


def register(
    app: typer.Typer, reported: Callable[[Callable[..., None]], Callable[..., None]]
) -> None:
    """Add the commands to `app`; `reported` turns errors of ours into exit codes."""
    app.command()(reported(answered(export)))
    app.command("import")(reported(answered(import_)))
    app.command("compare")(reported(compare_))


def answered(command: Callable[..., Answer]) -> Callable[..., None]:
    """`command` with an option more, --json: its answer is printed as text or as a document."""

    @wraps(command)
    def run(*args: Any, as_json: bool = False, **kwargs: Any) -> None:
        answer = command(*args, **kwargs)
        if as_json:
            _print_json(answer.document)
        for note in () if as_json else answer.document.get("notes", ()):
            sys.stderr.write(f"note: {note}\n")
        sys.stdout.write("" if as_json else f"{answer.text}\n")
        if answer.rest is not None:
            sys.stdout.flush()
            answer.rest()

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False,
                               annotation=Json)  # fmt: skip
    parameters = [*signature.parameters.values(), option]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, "as_json": Json, "return": None}
    return run


def export(
    places: Places,
    target: Annotated[Target, typer.Option("--to", help="The format to write.")],
    dtype: Annotated[
        Precision | None, typer.Option(help="safetensors: round all weights to this.")
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_WORLD_SIZE, help="deepspeed: ranks that will load it."),
    ] = None,
    stage: Annotated[
        int | None, typer.Option(help="deepspeed: their ZeRO stage; as it was if left out.")
    ] = None,
    sub_group_size: Annotated[
        int | None, typer.Option(min=1, help="deepspeed, stage 3: as in their config.")
    ] = None,
) -> Answer:
    """Write a checkpoint's state for another tool."""
    if not 2 <= len(places) <= 3:
        raise typer.BadParameter(f"PATH [TAG] OUT expected, given {' '.join(places)}")
    _check_options(target, dtype, ranks, stage, sub_group_size)
    storage, out = open_storage(places[0]), places[-1]
    info = find(storage, places[1] if len(places) > 2 else None)
    reader = CheckpointReader.open(storage, info.directory, digest=info.digest)
    if target is Target.SAFETENSORS:
        folder, name = _split(out)
        done = asdict(export_safetensors(
            reader, open_storage(folder), name, dtype=None if dtype is None else _DTYPES[dtype]
        ))  # fmt: skip
    else:
        assert ranks is not None
        with _with_deepspeed():
            # Only here: it takes torch, which the other commands do without.
            from spotspeed.integrations.deepspeed_export import export_deepspeed, target_of

            wanted = target_of(reader, ranks=ranks, stage=stage, sub_group_size=sub_group_size)
            done = export_deepspeed(reader, open_storage(out), info.tag, wanted)
    said = ", ".join(f"{name} {value}" for name, value in done.items())
    return Answer(
        f"{out}: {said}; from {info.tag} (step {info.step})",
        {"out": out, "tag": info.tag, "step": info.step, "made": dict(done)},
    )


def import_(
    source: Annotated[str, typer.Argument(help="What engine.save_checkpoint wrote to.")],
    to: Annotated[str, typer.Option("--to", help="Path of the checkpoints to import it to.")],
    tag: Annotated[
        str | None, typer.Option(help="DeepSpeed's tag; the one in latest if left out.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Class of the learning-rate scheduler, if not configured.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Even where the path holds a run: begin it anew.")
    ] = False,
) -> Answer:
    """Bring a checkpoint that DeepSpeed saved (ZeRO 1, 2 or 3) to PATH; runs no code of it."""
    with _with_deepspeed():
        from spotspeed.integrations.deepspeed_import import import_deepspeed

        done = import_deepspeed(
            pathlib.Path(source), open_storage(to), tag=tag, scheduler=scheduler, replaces=replace
        )
    ticket = done.manifest.ticket
    document = {
        "path": to, "directory": ticket.directory, "tag": ticket.tag, "step": ticket.step,
        "size_bytes": done.manifest.data_bytes, "notes": list(done.notes),
    }  # fmt: skip
    text = (f"{to}/{ticket.directory}: {ticket.tag}, step {ticket.step}, "
            f"{done.manifest.data_bytes} bytes")  # fmt: skip
    return Answer(text, document)


def compare_(
    first: Annotated[str, typer.Argument(help="Directory or URL of the checkpoints.")],
    second: Annotated[str, typer.Argument(help="Directory or URL of others, or the same.")],
    first_tag: Annotated[
        str | None, typer.Option(help="Tag or directory; the newest if left out.")
    ] = None,
    second_tag: Annotated[
        str | None, typer.Option(help="Tag or directory; the newest if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints bit by bit, whatever ranks wrote them; exit 1 if they differ."""
    readers = []
    for path, tag in ((first, first_tag), (second, second_tag)):
        storage = open_storage(path)
        info = find(storage, tag)
        readers.append(CheckpointReader.open(storage, info.directory, digest=info.digest))
    done = compare(*readers)
    if as_json:
        _print_json({"is_same": done.is_same, **asdict(done)})
    else:
        for difference in done.differences:
            sys.stdout.write(f"{difference.what}: {difference.how}\n")
        word = "the same bits" if done.is_same else f"{len(done.differences)} differences"
        sys.stdout.write(f"{done.tensors} tensors, {done.size_bytes} bytes: {word}\n")
    if not done.is_same:
        raise typer.Exit(1)


@contextlib.contextmanager
def _with_deepspeed() -> Iterator[None]:
    """DeepSpeed logs to what is stdout when it is imported: that is for our answer alone.

    Raises ConfigError where it, or torch, cannot be imported.
    """
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        except ImportError as error:
            raise ConfigError(
                f"this command needs PyTorch and DeepSpeed in the environment of {sys.executable}: "
                f"{error}"
            ) from error


def _print_json(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document, indent=2, sort_keys=True) + "\n")


def _check_options(
    target: Target, dtype: Precision | None, ranks: int | None, stage: int | None,
    sub_group_size: int | None,
) -> None:  # fmt: skip
    """Refuse what means nothing for this target, and what it lacks."""
    options: dict[str, object] = {"--dtype": dtype}
    if target is Target.SAFETENSORS:
        options = {"--ranks": ranks, "--stage": stage, "--sub-group-size": sub_group_size}
    elif ranks is None:
        raise typer.BadParameter(
            "--ranks is missing: DeepSpeed loads on the ranks it was saved for"
        )
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise typer.BadParameter(f"{', '.join(given)} means nothing with --to {target.value}")


def _split(out: str) -> tuple[str, str]:
    """The store and the key in it that stand for one file."""
    folder, _, name = out.rpartition("/")
    if not name or ("://" not in out and os.path.isdir(out)):
        raise typer.BadParameter(f"{out!r} names a directory: give the name of a file in it")
    return folder or ("/" if out.startswith("/") else "."), name
