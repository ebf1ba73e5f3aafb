"""How small and how fast real training state becomes, beside plain zstd, lz4 and ZipNN.

The state is a checkpoint of examples/train_gpt.py after some hundred steps in bf16 on real text
(made once, under build/): fp32 masters and both moments, without the weights' derivable copy.
Every contender takes all chunks once a round, in turning order. Rates are raw bytes per second of
processor time, of whatever threads, that is per core; medians with the middle half. ZipNN takes
part where it is installed (`pip install --no-deps zipnn`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import lz4.block
import zstandard

from spotspeed.checkpoint.catalog import list_sealed
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.codec import CodecPolicy, Frame, decode, encode
from spotspeed.core.chunks import plane_bytes
from spotspeed.storage import open_storage

ROOT = Path(__file__).resolve().parent.parent
BASELINE = 14 / 12
"""DeepSpeed also writes the bf16 weights, which follow from the masters."""


@dataclass(frozen=True)
class Chunk:
    """One chunk of the state; `kind` is "fp32" (master), "exp_avg" or "exp_avg_sq"."""

    kind: str
    item_bytes: int
    data: bytes


@dataclass(frozen=True)
class Contender:
    """A way to store a chunk: `pack(data, item_bytes)` and `unpack(stored, size, out)`."""

    name: str
    pack: Callable[[bytes, int], object]
    unpack: Callable[[object, bytearray], object]
    size: Callable[[object], int]


@dataclass(frozen=True)
class Result:
    """Ratio of all state and by kind, and GB/s a core: median and quartiles over the rounds."""

    name: str
    ratio: float
    ratio_of_14_bytes: float
    by_kind: dict[str, float]
    encode_gb_s: tuple[float, float, float]
    decode_gb_s: tuple[float, float, float]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", default=str(ROOT / "build" / "real_state"))
    parser.add_argument("--steps", type=int, default=300, help="steps of training, when it is made")
    parser.add_argument("--chunk-mb", type=int, default=4)
    parser.add_argument("--megabytes", type=int, default=96, help="how much of the state to take")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def train(folder: Path, steps: int) -> None:
    """Make the state: one rank of the example, ZeRO-2 in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 8, "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2}, "gradient_clipping": 1.0, "steps_per_print": 10**6,
        "optimizer": {"type": "AdamW",
                      "params": {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR",
                      "params": {"warmup_num_steps": 20, "warmup_max_lr": 1e-3}},
        "spotspeed": {"path": str(folder / "checkpoints"), "interval": {"seconds": None}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    sys.path.insert(0, str(ROOT))
    from tests.ranks import free_port, launch_command, rank_environment

    subprocess.run(
        launch_command(1, "examples/train_gpt.py", "--config", str(folder / "config.json"),
                       "--steps", str(steps), "--width", "384", "--layers", "6"),
        cwd=ROOT, env=rank_environment(free_port()), check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def load(folder: Path, steps: int, chunk_bytes: int, limit_bytes: int) -> tuple[list[Chunk], int]:
    """Chunks of every kind in equal parts, as a shard cuts them, and the step they are from."""
    storage = open_storage(str(folder / "checkpoints"))
    if not (folder / "checkpoints").exists() or not list_sealed(storage):
        train(folder, steps)
    newest = list_sealed(storage)[0]
    reader = CheckpointReader.open(storage, newest.directory)
    sections: dict[tuple[str, str], bytearray] = {}
    for key, tensor in reader.tensors().items():
        if tensor.dtype == "float32" and tensor.shape:
            section = sections.setdefault((key.kind, tensor.dtype), bytearray())
            section += reader.read_tensor(key).tobytes()
    chunks = []
    for (kind, dtype), section in sections.items():
        taken = len(section) // max(1, sum(map(len, sections.values())) // limit_bytes)
        for start in range(0, min(taken, len(section)), chunk_bytes):
            data = bytes(section[start : start + chunk_bytes])
            chunks.append(Chunk(kind, plane_bytes(dtype), data))
    return chunks, newest.step


def contenders() -> list[Contender]:
    """Every way to store a chunk, ours first."""
    found = []
    for name, policy in (
        ("sampled (remote default)", CodecPolicy.choose(None, is_worth=True)),
        ('compression: "zstd"', CodecPolicy.choose("zstd", is_worth=False)),
    ):
        found.append(Contender(name, ours(policy), our_decode, lambda frame: len(frame.payload)))
    for level in (1, 3):
        packer, unpacker = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
        found.append(Contender(
            f"zstd -{level}", lambda data, _, packer=packer: packer.compress(data),
            lambda stored, out, unpacker=unpacker: unpacker.decompress(stored), len,
        ))  # fmt: skip
    if importlib.util.find_spec("zipnn") is not None:
        found.append(zipnn())
    found.append(Contender(
        "lz4", lambda data, _: lz4.block.compress(data, store_size=False),
        lambda stored, out: lz4.block.decompress(stored, uncompressed_size=len(out)), len,
    ))  # fmt: skip
    return found


def zipnn() -> Contender:
    """Huffman coding of byte planes (Hershcovitch et al., "ZipNN", 2024), for chunks of float32."""
    from zipnn import ZipNN

    coder = ZipNN(bytearray_dtype="float32", input_format="byte", threads=1)

    def pack(data: bytes, _: int) -> bytes:
        # It reorders the buffer that it is given.
        packed: bytes = coder.compress(bytearray(data))
        return packed

    return Contender("ZipNN", pack, lambda stored, out: coder.decompress(stored), len)


def ours(policy: CodecPolicy) -> Callable[[bytes, int], Frame]:
    return lambda data, item_bytes: encode(data, item_bytes, policy)


def our_decode(frame: Frame, out: bytearray) -> None:
    decode(frame.codec, frame.payload, out, key="benchmark")


def measure(contender: Contender, chunks: list[Chunk], out: bytearray) -> tuple[float, float, dict]:
    """Seconds to encode and to decode all chunks, and stored bytes by kind."""
    began = time.process_time()
    stored = [contender.pack(chunk.data, chunk.item_bytes) for chunk in chunks]
    packed = time.process_time()
    for chunk, form in zip(chunks, stored, strict=True):
        contender.unpack(form, memoryview(out)[: len(chunk.data)])
    unpacked = time.process_time()
    sizes: dict[str, int] = {}
    for chunk, form in zip(chunks, stored, strict=True):
        sizes[chunk.kind] = sizes.get(chunk.kind, 0) + contender.size(form)
    return packed - began, unpacked - packed, sizes


def run(chunks: list[Chunk], rounds: int) -> list[Result]:
    raw: dict[str, int] = {}
    for chunk in chunks:
        raw[chunk.kind] = raw.get(chunk.kind, 0) + len(chunk.data)
    total = sum(raw.values())
    out = bytearray(max(len(chunk.data) for chunk in chunks))
    names = contenders()
    times: dict[str, list[tuple[float, float]]] = {one.name: [] for one in names}
    sizes: dict[str, dict[str, int]] = {}
    for number in range(rounds + 1):
        turn = number % len(names)
        for one in names[turn:] + names[:turn]:
            packing, unpacking, sizes[one.name] = measure(one, chunks, out)
            if number:  # the first round warms memory up
                times[one.name].append((total / packing / 1e9, total / unpacking / 1e9))
    results = []
    for one in names:
        ratio = total / sum(sizes[one.name].values())
        by_kind = {kind: size / sizes[one.name][kind] for kind, size in raw.items()}
        encoding, decoding = (spread([pair[i] for pair in times[one.name]]) for i in (0, 1))
        results.append(Result(one.name, ratio, ratio * BASELINE, by_kind, encoding, decoding))
    return results


def spread(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


def main() -> None:
    options = parse()
    chunks, step = load(
        Path(options.state), options.steps, options.chunk_mb << 20, options.megabytes * 10**6
    )
    results = run(chunks, options.rounds)
    size = sum(len(chunk.data) for chunk in chunks)
    if options.json:
        print(
            json.dumps(
                {
                    "step": step,
                    "bytes": size,
                    "cores": os.cpu_count(),
                    "load": os.getloadavg(),
                    "results": [asdict(r) for r in results],
                }
            )
        )
        return
    print(f"{size / 1e6:.0f} MB of state at step {step}, {options.rounds} rounds, "
          f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(f"{'':26}  ratio  of 14 B    encode GB/s a core     decode GB/s a core   by kind")
    for one in results:
        encoding, decoding = (f"{m:5.2f} ({low:.2f} to {high:.2f})"
                              for low, m, high in (one.encode_gb_s, one.decode_gb_s))  # fmt: skip
        kinds = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in one.by_kind.items())
        print(f"{one.name:26} {one.ratio:6.3f} {one.ratio_of_14_bytes:7.3f}  {encoding:>22} "
              f"{decoding:>22}   {kinds}")  # fmt: skip


if __name__ == "__main__":
    main()
