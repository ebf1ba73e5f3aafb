"""Writes a checkpoint's weights as a safetensors file: streamed, durable, without torch.

The format (https://huggingface.co/docs/safetensors, "Format"): an 8-byte little-endian length, a
JSON header of that many bytes with dtype, shape and byte range of each tensor, and the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from spotspeed.checkpoint.model import Weight, read_model
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.rounding import is_float, round_to
from spotspeed.core.interval import Interval
from spotspeed.core.layout import ITEM_BYTES, Fragment
from spotspeed.errors import UnsupportedLayoutError
from spotspeed.storage.contract import Storage, Writer

RUN_BYTES = 64 * 1024 * 1024
"""Bytes of stored numbers that are read at a time; bounds the memory of an export."""
_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: tensors (aliases are not counted) and bytes of the file."""

    tensors: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Run:
    """Elements of one weight that are read and written together."""

    weight: Weight
    interval: Interval
    dtype: str
    """What the file has them in."""


def export_safetensors(
    reader: CheckpointReader, storage: Storage, key: str, *, dtype: str | None = None
) -> Exported:
    """Write parameters and persistent buffers to `key` of `storage`; durable on return.

    Every weight in the dtype that the module has it in, or all floating-point ones in `dtype`,
    rounded from the master. A tied parameter is written once; the header's metadata maps its other
    names to it, as safetensors' own `save_model` does. Raises CorruptionError for a damaged
    checkpoint, UnsupportedLayoutError for a dtype that the format lacks.
    """
    model = read_model(reader)
    dtypes = {weight.name: _dtype_of(weight, dtype) for weight in model.weights}
    # The widest first, so that every tensor is aligned, as the library itself writes them.
    order = sorted(model.weights, key=lambda w: (-ITEM_BYTES[dtypes[w.name]], w.name))
    header = _header(order, dtypes, {"format": "pt", **model.aliases})
    with storage.writer(key) as writer:
        writer.write(header)
        for runs in _batches(reader, order, dtypes):
            _copy(reader, runs, writer)
        size_bytes = writer.position
        writer.commit()
    return Exported(len(order), size_bytes)


def _dtype_of(weight: Weight, wanted: str | None) -> str:
    found = wanted if wanted is not None and is_float(weight.dtype) else weight.dtype
    if found not in _NAMES:
        raise UnsupportedLayoutError(f"{weight.name}: safetensors has no {found}")
    return found


def _header(
    order: Sequence[Weight], dtypes: Mapping[str, str], metadata: Mapping[str, str]
) -> bytes:
    document: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for weight in order:
        stop = position + math.prod(weight.shape) * ITEM_BYTES[dtypes[weight.name]]
        document[weight.name] = {
            "dtype": _NAMES[dtypes[weight.name]], "shape": list(weight.shape),
            "data_offsets": [position, stop],
        }  # fmt: skip
        position = stop
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _batches(
    reader: CheckpointReader, order: Sequence[Weight], dtypes: Mapping[str, str]
) -> Iterator[list[Run]]:
    """All elements in the file's order, in batches of about RUN_BYTES of what is stored."""
    batch: list[Run] = []
    room = RUN_BYTES
    for weight in order:
        if weight.source is None:
            continue
        item_bytes = ITEM_BYTES[reader.tensors()[weight.source].dtype]
        start, stop = 0, math.prod(weight.shape)
        while start < stop:
            count = min(stop - start, max(1, room // item_bytes))
            batch.append(Run(weight, Interval(start, start + count), dtypes[weight.name]))
            start, room = start + count, room - count * item_bytes
            if room < item_bytes:
                yield batch
                batch, room = [], RUN_BYTES
    if batch:
        yield batch


def _copy(reader: CheckpointReader, runs: Sequence[Run], writer: Writer) -> None:
    for data in read_runs(reader, runs):
        writer.write(data)


def read_runs(reader: CheckpointReader, runs: Sequence[Run]) -> Iterator[bytes | memoryview]:
    """The elements of each run as the module has them: rounded, but where training has others."""
    requests: list[tuple[Fragment, bytearray]] = []
    for run in runs:
        assert run.weight.source is not None
        stored = reader.tensors()[run.weight.source]
        fragment = Fragment(run.weight.source, stored.dtype, stored.shape, run.interval)
        requests.append((fragment, bytearray(fragment.size_bytes)))
    reader.read_into(requests)
    for run, (fragment, data) in zip(runs, requests, strict=True):
        yield _override(reader, run, round_to(data, fragment.dtype, run.dtype))


def _override(
    reader: CheckpointReader, run: Run, rounded: bytes | memoryview
) -> bytes | memoryview:
    """`rounded` with the elements that training has otherwise, where the file keeps their dtype."""
    changed: bytearray | None = None
    for start, key in run.weight.overrides.items():
        stored = reader.tensors()[key]
        common = Interval(start, start + math.prod(stored.shape)).intersect(run.interval)
        if common is None or stored.dtype != run.dtype:
            continue
        fragment = Fragment(key, stored.dtype, stored.shape, common.shift(-start))
        data = bytearray(fragment.size_bytes)
        reader.read_into([(fragment, data)])
        changed = bytearray(rounded) if changed is None else changed
        offset = (common.start - run.interval.start) * ITEM_BYTES[run.dtype]
        changed[offset : offset + len(data)] = data
    return rounded if changed is None else bytes(changed)
