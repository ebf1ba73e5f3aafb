"""How fast is a save out of the training's memory, and how fast is it durable.

A real saver process, state of many parameters, interleaved rounds: beside a plain copy of the same
bytes into warm memory, and beside a plain write and fsync of the same bytes to the same disk.
Medians with the middle half; `--json` prints one document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from spotspeed.config import parse_block
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket
from spotspeed.staging.stager import Stager
from spotspeed.storage.local import LocalStorage

RETURNS = "stage() returns"


@dataclass(frozen=True)
class Result:
    """Time of one contender: median and quartiles over the rounds, in ms, and its bandwidth.

    `gb_s` is None where no bytes are moved.
    """

    name: str
    median_ms: float
    low_ms: float
    high_ms: float
    gb_s: float | None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mb", type=int, default=512, help="bytes of a save, in MB")
    parser.add_argument("--parameters", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", default=None, help="where to write; default: a temporary")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def make_state(size_bytes: int, parameters: int) -> list[tuple[Fragment, torch.Tensor]]:
    """fp32 master and both moments, as views of one flat buffer each, as ZeRO keeps them."""
    count = size_bytes // 12 // parameters
    pieces = []
    for kind in ("fp32", "exp_avg", "exp_avg_sq"):
        flat = torch.randn(count * parameters)
        for number in range(parameters):
            fragment = Fragment(
                TensorKey(kind, f"model.layers.{number}.weight"), "float32", (count,),
                Interval(0, count),
            )  # fmt: skip
            pieces.append((fragment, flat.narrow(0, number * count, count)))
    return pieces


class Bench:
    """One arrangement: the state, a stager with its saver, and buffers to compare with."""

    def __init__(self, directory: Path, size_bytes: int, parameters: int) -> None:
        self.pieces = make_state(size_bytes, parameters)
        self.size_bytes = sum(fragment.size_bytes for fragment, _ in self.pieces)
        self.copies = [torch.zeros_like(tensor) for _, tensor in self.pieces]
        self.directory = directory
        self.storage = LocalStorage(directory / "store")
        self.stager = Stager(str(directory / "store"), parse_block({"path": str(directory)}), 0)
        self.stager.reserve(self.size_bytes)
        self.step = 0

    def copy(self) -> dict[str, float]:
        began = time.perf_counter()
        for (_, source), target in zip(self.pieces, self.copies, strict=True):
            target.copy_(source)
        return {"plain copy": time.perf_counter() - began}

    def write(self) -> dict[str, float]:
        path = self.directory / "plain"
        buffers = [memoryview(tensor.numpy()).cast("B") for _, tensor in self.pieces]
        began = time.perf_counter()
        with open(path, "wb", buffering=0) as file:
            for buffer in buffers:
                file.write(buffer)
            os.fsync(file.fileno())
        took = time.perf_counter() - began
        path.unlink()
        return {"plain write + fsync": took}

    def save(self, *, helping: bool) -> dict[str, float]:
        self.step += 1
        ticket = Ticket(1, self.step, "a", f"step-{self.step}", "periodic", 1, 0)
        began = time.perf_counter()
        save = self.stager.stage(ticket, self.pieces, {})
        returned = time.perf_counter() - began
        if helping:
            save.wait_staged()
        save.staging_completion.result()
        staged = time.perf_counter() - began
        save.upload_completion.result()
        durable = time.perf_counter() - began
        self.storage.delete_prefix(ticket.directory)
        if not helping:
            return {"stage, in the background": staged, RETURNS: returned}
        return {"stage, a waiting gate helps": staged, "save until durable": durable}


def measure(bench: Bench, rounds: int) -> list[Result]:
    contenders = [bench.copy, bench.write, lambda: bench.save(helping=True),
                  lambda: bench.save(helping=False)]  # fmt: skip
    times: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        turn = number % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            for name, seconds in contender().items():
                if number:  # the first round warms memory up
                    times.setdefault(name, []).append(seconds)
    results = []
    for name, seconds_list in sorted(times.items()):
        low, median, high = statistics.quantiles(seconds_list, n=4)
        rate = None if name == RETURNS else bench.size_bytes / median / 1e9
        results.append(Result(name, median * 1e3, low * 1e3, high * 1e3, rate))
    return results


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        bench = Bench(Path(directory), options.size_mb * 1_000_000, options.parameters)
        results = measure(bench, options.rounds)
        bench.stager.close()
    if options.json:
        print(json.dumps({"size_bytes": bench.size_bytes, "cores": os.cpu_count(),
                          "results": [asdict(result) for result in results]}))  # fmt: skip
        return
    print(f"{bench.size_bytes / 1e6:.0f} MB in {len(bench.pieces)} tensors, {os.cpu_count()} cores")
    for result in results:
        rate = "" if result.gb_s is None else f"  {result.gb_s:6.2f} GB/s"
        print(f"{result.name:28} {result.median_ms:9.1f} ms  ({result.low_ms:.1f} to "
              f"{result.high_ms:.1f}){rate}")  # fmt: skip


if __name__ == "__main__":
    main()
