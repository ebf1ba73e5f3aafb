"""One DeepSpeed checkpoint on disk: which files it has, and what they say of its ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotspeed.errors import (
    ConfigError,
    FormatError,
    ObjectNotFoundError,
    UnsupportedLayoutError,
)
from spotspeed.integrations.deepspeed_files import read_file

_OPTIMIZER = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_FOREIGN = re.compile(r"(layer_\d+|expert_\d+|expp_rank_\d+).*\.pt")


@dataclass(frozen=True, slots=True)
class Directory:
    """The content of a checkpoint's files, tensors mapped; one optimizer file a rank.

    There is one model file, or with ZeRO-3 one a rank.
    """

    folder: Path
    tag: str
    stage: int
    models: Sequence[dict[str, Any]]
    optimizers: Sequence[dict[str, Any]]

    @property
    def ranks(self) -> int:
        return len(self.optimizers)

    def base(self, rank: int) -> dict[str, Any]:
        """The inner optimizer's state_dict of one rank."""
        key = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        found = self.optimizers[rank].get(key)
        if isinstance(found, list):
            raise UnsupportedLayoutError(
                f"{self.folder}: saved with elastic_checkpoint, which keeps no hyper-parameters"
            )
        if not isinstance(found, dict) or not {"state", "param_groups"} <= found.keys():
            raise FormatError(f"{self.folder}: rank {rank} has no state of an optimizer in {key}")
        return found

    def masters(self, rank: int) -> list[Any]:
        """The master partitions of one rank, those of stages 1 and 2 without their padding."""
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        found = self.optimizers[rank].get(key)
        if not isinstance(found, list | tuple):
            raise FormatError(f"{self.folder}: rank {rank} has no {key}")
        return list(found)


def open_directory(source: Path, tag: str | None = None) -> Directory:
    """Read what is in `source`/`tag`, by default the tag that "latest" names, or in `source`.

    Raises ObjectNotFoundError when files are missing, FormatError for what cannot be read without
    running code, UnsupportedLayoutError for other than data-parallel training under ZeRO.
    """
    folder = _folder(source, tag)
    names = sorted(path.name for path in folder.iterdir())
    optimizers = [match for name in names if (match := _OPTIMIZER.fullmatch(name))]
    models = [match for name in names if (match := _MODEL.fullmatch(name))]
    foreign = [name for name in names if _FOREIGN.fullmatch(name)]
    foreign += [m[0] for m in (*optimizers, *models) if int(m[3])]
    if foreign:
        raise UnsupportedLayoutError(
            f"{folder}: {foreign[0]} is of pipeline, tensor or expert parallel training; only "
            f"data-parallel training is imported"
        )
    if not optimizers:
        raise UnsupportedLayoutError(
            f"{folder}: no file *_optim_states.pt; only training under ZeRO 1, 2 or 3 is imported"
        )
    ordered = _in_order(folder, [(int(match[2]), match[0]) for match in optimizers])
    contents = [_optimizer(folder / name) for name in ordered]
    stages = {int(content.get("zero_stage", 1)) for content in contents}
    if len(stages) != 1 or not stages <= {1, 2, 3}:
        raise FormatError(f"{folder}: the ranks' ZeRO stages are {sorted(stages)}")
    stage = stages.pop()
    if stage == 3:
        files = _in_order(folder, [(int(match[2]), match[0]) for match in models if match[2]])
    else:
        files = ["mp_rank_00_model_states.pt"]
    read = [read_file(folder / name) for name in files]
    _check_ranks(folder, read, len(contents), stage)
    return Directory(folder, folder.name, stage, read, contents)


def _is_below(tag: str) -> bool:
    return "\0" not in tag and ".." not in Path(tag).parts and not Path(tag).is_absolute()


def _folder(source: Path, tag: str | None) -> Path:
    if tag is None and (source / "latest").is_file():
        tag = (source / "latest").read_text(encoding="utf-8", errors="replace").strip()
    elif tag is not None and not _is_below(tag):
        raise ConfigError(f"tag {tag!r} is not a name of a folder in {source}")
    folder = source if tag is None else source / tag
    if tag is not None and not _is_below(tag):
        raise FormatError(f"{source}/latest: {tag!r} is not a name of a folder beside it")
    if not folder.is_dir():
        raise ObjectNotFoundError(f"{folder}: there is no such directory")
    return folder


def _in_order(folder: Path, found: list[tuple[int, str]]) -> list[str]:
    """The files by rank; every rank up to the last has one."""
    found.sort()
    for expected, (rank, _) in enumerate(found):
        if rank != expected:
            raise ObjectNotFoundError(f"{folder}: the file of rank {expected} is missing")
    return [name for _, name in found]


def _optimizer(path: Path) -> dict[str, Any]:
    content = read_file(path).get("optimizer_state_dict")
    if not isinstance(content, dict):
        raise FormatError(f"{path}: holds no optimizer_state_dict")
    return content


def _check_ranks(folder: Path, models: list[dict[str, Any]], ranks: int, stage: int) -> None:
    said = models[0].get("dp_world_size") if models else None
    if said != ranks or (stage == 3 and len(models) != ranks):
        raise ObjectNotFoundError(
            f"{folder}: of {said} ranks; there are {ranks} optimizer files and {len(models)} model "
            f"files"
        )
    if models[0].get("mp_world_size", 1) != 1:
        raise UnsupportedLayoutError(f"{folder}: of model-parallel training, which is not imported")
