"""How fast is state staged to shared memory, and what does it cost beside numpy's copy.

Interleaved rounds (every contender once a round, in turning order), so that a machine that slows
down slows all of them; medians with the range of the middle half. One line a contender, in GB/s of
bytes copied (memory traffic is at least twice that). `--json` prints one document instead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from spotspeed._native import has_avx2, join_planes, split_planes, split_planes_scalar
from spotspeed.staging.native import Arena, CopyEngine, buffer_range, gather


@dataclass(frozen=True)
class Result:
    """Throughput of one contender: median and quartiles over the rounds, in GB/s."""

    name: str
    median_gb_s: float
    low_gb_s: float
    high_gb_s: float
    rounds: int


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mb", type=int, default=256, help="bytes per copy, in MB")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def contenders(size: int) -> dict[str, Callable[[], None]]:
    """Every contender by name; all read one source and write warm memory of their own."""
    source = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    plain, arena = np.zeros(size, np.uint8), Arena.create(size)
    arena.prefault(0, size)
    shared = np.frombuffer(arena, np.uint8)
    chunk = source[: 4 << 20]
    out, back = np.zeros_like(chunk), np.zeros_like(chunk)
    found: dict[str, Callable[[], None]] = {
        "numpy copy, private memory": lambda: np.copyto(plain, source),
        "numpy copy, arena": lambda: np.copyto(shared, source),
        "numpy, 4 KB pieces, arena": lambda: piecewise(source, shared, 4096),
    }
    whole = gather([buffer_range(source)], buffer_range(arena, writable=True))
    pieces = gather(
        [buffer_range(source[at : at + 4096]) for at in range(0, size, 4096)],
        buffer_range(arena, writable=True),
    )
    for threads in sorted({1, os.cpu_count() or 1}):
        for name, copies in (("whole", whole), ("4 KB pieces", pieces)):
            engine = CopyEngine(threads)
            found[f"engine, {threads} thread(s), {name}, arena"] = run(engine, copies)
    count = size // chunk.nbytes
    for name, function in (("AVX2" if has_avx2() else "plain", split_planes),
                           ("plain twin", split_planes_scalar)):  # fmt: skip
        found[f"split planes of 4 bytes, {name}"] = repeat(count, function, chunk, out)
    found["join planes of 4 bytes"] = repeat(count, join_planes, out, back)
    return found


def run(engine: CopyEngine, copies: list[tuple[int, int, int]]) -> Callable[[], None]:
    return lambda: engine.submit(copies).wait_for(600) or None


def repeat(
    count: int,
    transform: Callable[[np.ndarray, np.ndarray, int], None],
    source: np.ndarray,
    target: np.ndarray,
) -> Callable[[], None]:
    def body() -> None:
        for _ in range(count):
            transform(source, target, 4)

    return body


def piecewise(source: np.ndarray, target: np.ndarray, size: int) -> None:
    for at in range(0, source.nbytes, size):
        target[at : at + size] = source[at : at + size]


def measure(found: dict[str, Callable[[], None]], size: int, rounds: int) -> list[Result]:
    names = list(found)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        found[name]()  # pages, caches and threads are warm before the first measured round
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            found[name]()
            rates[name].append(size / (time.perf_counter() - start) / 1e9)
    results = []
    for name in names:
        low, median, high = statistics.quantiles(rates[name], n=4)
        results.append(Result(name, median, low, high, rounds))
    return results


def main() -> None:
    arguments = parse()
    size = arguments.size_mb * 1_000_000 // (4 << 20) * (4 << 20)
    results = measure(contenders(size), size, arguments.rounds)
    if arguments.json:
        document = {"size_bytes": size, "cpus": os.cpu_count(), "avx2": has_avx2(),
                    "results": [asdict(result) for result in results]}  # fmt: skip
        print(json.dumps(document, indent=2))
        return
    print(f"{size / 1e6:.0f} MB, {os.cpu_count()} CPUs, {arguments.rounds} interleaved rounds")
    for result in results:
        spread = f"{result.low_gb_s:.2f} to {result.high_gb_s:.2f}"
        print(f"{result.name:48} {result.median_gb_s:6.2f} GB/s  (middle half {spread})")


if __name__ == "__main__":
    main()
