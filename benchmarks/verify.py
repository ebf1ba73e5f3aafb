"""How fast `spotspeed verify` reads, beside a plain read of the same files.

A checkpoint of random state is written once. Then plain reads (pieces of 8 MiB, on as many threads)
and verifies take turns, each with the files out of the page cache and in it. Ratios are within one
round; medians with the middle half.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from spotspeed.checkpoint.commit import try_seal
from spotspeed.checkpoint.fetch import SPAN_BYTES, scratch
from spotspeed.checkpoint.parallel import in_parallel
from spotspeed.checkpoint.sealed import open_manifest
from spotspeed.checkpoint.shard import ShardWriter
from spotspeed.checkpoint.verify import verify_checkpoint
from spotspeed.codec import CodecPolicy
from spotspeed.core.chunks import pack
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket
from spotspeed.storage.local import LocalStorage

CHUNK_BYTES = 4 * 1024 * 1024
Times = list[list[float]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--megabytes", type=int, default=600, help="of all shards together")
    parser.add_argument("--compressed", action="store_true", help="with compression zstd")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", default=None, help="where to write; default: a temporary")
    return parser.parse_args()


def write(storage: LocalStorage, options: argparse.Namespace) -> Ticket:
    """Float32 with the exponents of trained weights, cut among the shards."""
    ticket = Ticket(1, 1, "a", "all", "explicit", options.shards, 0)
    elements = options.megabytes * 10**6 // 4
    policy = CodecPolicy("zstd" if options.compressed else "raw", min_gain=0.01)
    rng = np.random.default_rng(1)
    for rank in range(options.shards):
        part = Interval(0, elements).split(options.shards, rank)
        fragment = Fragment(TensorKey("fp32", "w"), "float32", (elements,), part)
        layout = pack([fragment], chunk_bytes=CHUNK_BYTES)
        with ShardWriter(storage, ticket, rank, layout, policy) as writer:
            for chunk in layout.chunks:
                values = rng.standard_normal(chunk.size_bytes // 4, dtype=np.float32) * 0.02
                writer.put_chunk(chunk.index, memoryview(values).cast("B"))
            writer.finish()
    assert try_seal(storage, ticket) is not None
    return ticket


def read_plainly(files: list[Path], threads: int) -> None:
    pieces = [(file, start) for file in files
              for start in range(0, file.stat().st_size, SPAN_BYTES)]  # fmt: skip

    def read(piece: tuple[Path, int]) -> None:
        descriptor = os.open(piece[0], os.O_RDONLY)
        try:
            os.preadv(descriptor, [scratch(SPAN_BYTES)], piece[1])
        finally:
            os.close(descriptor)

    in_parallel(read, pieces, threads=threads)


def forget(files: list[Path]) -> None:
    """Take the files out of the page cache; they have been fsynced."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def spread(values: list[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        storage = LocalStorage(folder)
        ticket = write(storage, options)
        manifest = open_manifest(storage, ticket.directory)
        files = sorted(Path(folder, ticket.directory).iterdir())
        size = sum(file.stat().st_size for file in files)
        print(f"{size / 1e6:.0f} MB in {options.shards} shards, {os.cpu_count()} cores, load "
              f"{os.getloadavg()[0]:.1f}")  # fmt: skip
        for threads in options.threads:
            calls: list[Callable[[], object]] = [
                partial(verify_checkpoint, storage, manifest, threads=threads),
                partial(read_plainly, files, threads),
            ]
            for name, before in (("cold", partial(forget, files)), ("warm", lambda: None)):
                ours, plain = compare(calls, before, options.rounds)
                ratios = [one / other for one, other in zip(ours, plain, strict=True)]
                print(f"{threads} threads, {name}: verify {spread([size / s / 1e9 for s in ours])} "
                      f"GB/s, plain {spread([size / s / 1e9 for s in plain])} GB/s, verify takes "
                      f"{spread(ratios)} of the plain read's time", flush=True)  # fmt: skip


def compare(calls: list[Callable[[], object]], before: Callable[[], None], rounds: int) -> Times:
    """Seconds of each call, in turns; `before` is called before each."""
    times: Times = [[] for _ in calls]
    for number in range(rounds + 1):
        for index in range(len(calls)) if number % 2 else reversed(range(len(calls))):
            before()
            took = timed(calls[index])
            if number:  # the first round warms memory up
                times[index].append(took)
    return times


if __name__ == "__main__":
    main()
