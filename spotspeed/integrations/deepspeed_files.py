"""DeepSpeed's checkpoint files: their names, writing them durably, reading them without code."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from spotspeed.errors import FormatError, ObjectNotFoundError
from spotspeed.storage.contract import Storage, Writer


class Plain:
    """Stands for an object of a DeepSpeed class: its attributes, none of its code."""


class Enumerated(int):
    """Stands for a member of one of DeepSpeed's integer enumerations."""


_SCALERS = "deepspeed.runtime.fp16.loss_scaler"
_STAND_INS: dict[str, type] = {
    f"{_SCALERS}.LossScaler": Plain,
    f"{_SCALERS}.DynamicLossScaler": Plain,
    "deepspeed.utils.tensor_fragment.fragment_address": Plain,
    "deepspeed.runtime.zero.config.ZeroStageEnum": Enumerated,
}
"""What DeepSpeed's files hold beside plain data and tensors, and what it is read as."""
_MEMBERS = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3}
"""Those of ZeroStageEnum, the only enumeration; some versions of Python store members by name."""


_GLOBAL = re.compile(r"GLOBAL (\S+)")


def model_file(tag: str, rank: int | None) -> str:
    """The key of the module's file: one for all ranks, or with ZeRO-3 one for each."""
    prefix = "" if rank is None else f"zero_pp_rank_{rank}_"
    return f"{tag}/{prefix}mp_rank_00_model_states.pt"


def optimizer_file(tag: str, rank: int, *, is_bf16: bool) -> str:
    """The key of one rank's optimizer file."""
    prefix = "bf16_" if is_bf16 else ""
    return f"{tag}/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def write_file(storage: Storage, key: str, content: Mapping[str, Any]) -> int:
    """Store `content` as torch.save does; durable on return. Returns the size in bytes."""
    with storage.writer(key) as writer:
        torch.save(dict(content), cast(IO[bytes], _Stream(writer)))
        size_bytes = writer.position
        writer.commit()
    return size_bytes


def read_file(path: Path) -> dict[str, Any]:
    """What torch.save wrote to `path`, with its tensors mapped rather than read.

    No code of the file is run: a type that is neither plain data, a tensor nor one of DeepSpeed's
    own few is FormatError naming file and type.
    """
    if not path.is_file():
        raise ObjectNotFoundError(f"{path}: there is no such file")
    try:
        with torch.serialization.safe_globals(_stand_ins()):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path}: cannot be read without running code: {_reason(error)}"
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: not a file of torch.save, or damaged: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: holds a {type(content).__name__}, expected a dict")
    return content


class _Stream:
    """What torch.save writes to, on top of a store's writer."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def write(self, data: bytes | memoryview) -> int:
        self._writer.write(data)
        return len(data)

    def flush(self) -> None:
        """Nothing to do: the writer's commit is what counts."""


def _stand_ins() -> list[Any]:
    """One class per foreign name, bearing that name: torch finds it by module and name."""
    classes = [
        type(name.rpartition(".")[2], (kind,), {"__module__": name.rpartition(".")[0]})
        for name, kind in _STAND_INS.items()
    ]
    return [*classes, (_member, "builtins.getattr")]


def _member(kind: Any, name: Any, *rest: Any) -> Enumerated:
    """A member of an enumeration by its name: what pickle has Python's `getattr` do for one.

    Python 3.11.0 to 3.11.3 wrote members so. It looks at no object; everything else is refused.
    """
    is_known = isinstance(kind, type) and issubclass(kind, Enumerated) and isinstance(name, str)
    if rest or not is_known or name not in _MEMBERS:
        raise pickle.UnpicklingError("GLOBAL getattr of what is no member of an enumeration")
    return Enumerated(_MEMBERS[name])


def _reason(error: Exception) -> str:
    """What torch's message says is in the way: mostly a type, by its name."""
    text = str(error)
    named = _GLOBAL.search(text)
    if named:
        return f"it holds {named[1]}, which is not plain data, a tensor or DeepSpeed's own"
    return text.splitlines()[0] if text else type(error).__name__
