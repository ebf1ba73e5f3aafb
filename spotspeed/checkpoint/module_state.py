"""The state dict of the module that a checkpoint is of, as `torch.nn.Module.state_dict` gives it.

It is what DeepSpeed's loaders hand to a `custom_load_fn`, and all that an engine without an
optimizer can use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from spotspeed.checkpoint.model import Weight, read_model
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.rounding import ROUNDED, is_float
from spotspeed.checkpoint.safetensors import Run, read_runs
from spotspeed.core.interval import Interval
from spotspeed.state.piece import dtype_of


def read_module(reader: CheckpointReader, live: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers on the CPU; names of tied parameters share a tensor.

    `live` says by name in which dtype the module has them now: floating-point numbers come rounded
    from the master to that, everything else as it was. Costs the memory of the whole module.
    Raises CorruptionError for what does not verify.
    """
    model = read_model(reader)
    state = {weight.name: _read(reader, weight, live) for weight in model.weights}
    for alias, name in model.aliases.items():
        if name in state:
            state[alias] = state[name]
    return state


def _read(reader: CheckpointReader, weight: Weight, live: Mapping[str, str]) -> torch.Tensor:
    wanted = live.get(weight.name, weight.dtype)
    dtype = wanted if is_float(weight.dtype) and wanted in ROUNDED else weight.dtype
    count = math.prod(weight.shape)
    if weight.source is None or not count:
        return torch.empty(weight.shape, dtype=dtype_of(dtype))
    (data,) = read_runs(reader, [Run(weight, Interval(0, count), dtype)])
    flat = torch.frombuffer(bytearray(data), dtype=dtype_of(dtype))
    return flat.reshape(weight.shape)
