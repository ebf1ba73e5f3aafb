"""The commands that exchange checkpoints with other tools: export and import."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any, ParamSpec

import typer

from spotspeed.checkpoint.catalog import find
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.safetensors import export_safetensors
from spotspeed.errors import ConfigError
from spotspeed.storage import open_storage

P = ParamSpec("P")
Places = Annotated[list[str], typer.Argument(
    metavar="PATH [TAG] OUT", help="The checkpoints, one of them (else the newest), what to make."
)]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


class Target(StrEnum):
    """What an export can make."""

    SAFETENSORS = "safetensors"


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
    app.command()(reported(export))


def export(
    places: Places,
    target: Annotated[Target, typer.Option("--to", help="The format to write.")],
    dtype: Annotated[Precision | None, typer.Option(help="Round all weights to this.")] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint's state for another tool."""
    if not 2 <= len(places) <= 3:
        raise ConfigError(f"PATH [TAG] OUT expected, given {' '.join(places)}")
    storage, out = open_storage(places[0]), places[-1]
    info = find(storage, places[1] if len(places) > 2 else None)
    reader = CheckpointReader.open(storage, info.directory, digest=info.digest)
    folder, name = _split(out)
    done = export_safetensors(
        reader, open_storage(folder), name, dtype=None if dtype is None else _DTYPES[dtype]
    )
    _say(f"{out}: {done.tensors} tensors, {done.size_bytes} bytes, of {info.tag} "
         f"(step {info.step})", {"out": out, "tag": info.tag, "step": info.step, **asdict(done)},
         as_json)  # fmt: skip


def _split(out: str) -> tuple[str, str]:
    """The store and the key in it that stand for one file."""
    folder, _, name = out.rpartition("/")
    if not name or ("://" not in out and os.path.isdir(out)):
        raise ConfigError(f"{out!r} names a directory: give the name of a file in it")
    return folder or ("/" if out.startswith("/") else "."), name


def _say(text: str, document: dict[str, Any], as_json: bool) -> None:
    line = json.dumps(document, indent=2, sort_keys=True) if as_json else text
    sys.stdout.write(line + "\n")
