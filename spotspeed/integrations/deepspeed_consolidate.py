"""DeepSpeed's `zero_to_fp32` functions, for folders in which spotspeed has left its markers.

`get_fp32_state_dict_from_zero_checkpoint` and what is built on it (`load_state_dict_from_...`,
`convert_zero_checkpoint_to_...`) find the tag's folder by themselves and read it with one private
function, which is wrapped: so it does not matter under what name a script has imported them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from spotspeed.checkpoint.marker import read_marker
from spotspeed.checkpoint.model import Weight, read_model
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.core.layout import KIND_MASTER
from spotspeed.storage import open_storage

_READER = "_get_fp32_state_dict_from_zero_checkpoint"
_MARK = "_spotspeed_hook"


def plug_in() -> None:
    """Let DeepSpeed's functions read both kinds of folders; again is harmless."""
    from deepspeed.utils import zero_to_fp32

    original: Callable[..., Any] | None = getattr(zero_to_fp32, _READER, None)
    if original is None or getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def read(ds_checkpoint_dir: Any, exclude_frozen_parameters: bool = False) -> Any:
        found = consolidated(ds_checkpoint_dir, excludes_frozen=exclude_frozen_parameters)
        if found is None:
            return original(ds_checkpoint_dir, exclude_frozen_parameters)
        return found

    setattr(read, _MARK, True)
    setattr(zero_to_fp32, _READER, read)


def consolidated(
    folder: str | os.PathLike[str], *, excludes_frozen: bool = False
) -> dict[str, torch.Tensor] | None:
    """The module's state_dict in float32 of what the marker in `folder` stands for.

    Parameters and persistent buffers, in host memory; what is not floating-point keeps its dtype,
    tied names share one tensor. None where there is no marker. Raises CorruptionError for a marker
    or a checkpoint that is damaged, ObjectNotFoundError when the checkpoint is gone.
    """
    parent, tag = os.path.split(os.path.abspath(folder))
    marker = read_marker(open_storage(parent), tag)
    if marker is None:
        return None
    storage = open_storage(marker.url)
    reader = CheckpointReader.open(storage, marker.directory, digest=marker.digest)
    model = read_model(reader)
    found = {
        weight.name: _read(reader, weight)
        for weight in model.weights
        if not (excludes_frozen and _is_frozen(weight))
    }
    return found | {alias: found[name] for alias, name in model.aliases.items() if name in found}


def _is_frozen(weight: Weight) -> bool:
    is_trained = weight.source is not None and weight.source.kind == KIND_MASTER
    return not weight.is_buffer and not is_trained


def _read(reader: CheckpointReader, weight: Weight) -> torch.Tensor:
    if weight.source is None:
        return torch.empty(weight.shape)
    tensor = torch.from_numpy(reader.read_tensor(weight.source, 0, None)).view(weight.shape)
    return tensor.float() if tensor.is_floating_point() else tensor
