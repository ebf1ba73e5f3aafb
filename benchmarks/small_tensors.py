"""What many small tensors cost in a save, beside one tensor of the same bytes.

    python benchmarks/small_tensors.py [--count N] [--bytes-each N] [--rounds N]

Two stagers with a saver each, in turns: the same bytes as `--count` tensors and as one. Prints one
JSON document of medians in ms: until staged, a waiting gate helping; processor time of this process
until then; until durable; processor time of the saver (in steps of 10 ms); and the ratios. The
first save, which describes the tensors to the saver, stands beside the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from spotspeed.config import parse_block
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket
from spotspeed.staging.stager import Stager

TICK_MS = 1000 / os.sysconf("SC_CLK_TCK")
Times = dict[str, float]


class Contender:
    """The state as so many tensors, and a stager with a saver of its own."""

    def __init__(self, directory: Path, count: int, size_bytes: int) -> None:
        elements = size_bytes // 4
        flat = torch.randn(count * elements)
        self.pieces = [
            (Fragment(TensorKey("exp_avg", f"model.layers.{n}.weight"), "float32", (elements,),
                      Interval(0, elements)), flat.narrow(0, n * elements, elements))
            for n in range(count)
        ]  # fmt: skip
        self.stager = Stager(str(directory), parse_block({"path": str(directory)}), 0)
        self.stager.reserve(count * size_bytes)
        self.step = 0

    def save(self) -> Times:
        """One save, from the call until it is durable."""
        self.step += 1
        ticket = Ticket(1, self.step, "a", f"step-{self.step}", "periodic", 1, 0)
        saver = self.stager._open_session().saver_pid
        began, used, saver_ms = time.perf_counter(), time.process_time(), processor_ms(saver)
        save = self.stager.stage(ticket, self.pieces, {})
        save.wait_staged()
        save.staging_completion.result()
        staged, used = time.perf_counter(), time.process_time() - used
        save.upload_completion.result()
        return {
            "staged": (staged - began) * 1e3, "processor of the rank": used * 1e3,
            "durable": (time.perf_counter() - began) * 1e3,
            "processor of the saver": processor_ms(saver) - saver_ms,
        }  # fmt: skip


def processor_ms(process: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_MS


def medians(rounds: list[Times]) -> Times:
    return {name: round(statistics.median(times[name] for times in rounds), 2)
            for name in rounds[0]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--bytes-each", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        contenders = {
            "many": Contender(Path(directory, "many"), options.count, options.bytes_each),
            "one": Contender(Path(directory, "one"), 1, options.count * options.bytes_each),
        }
        first = {name: medians([contender.save()]) for name, contender in contenders.items()}
        rounds: dict[str, list[Times]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, contender in contenders.items():
                rounds[name].append(contender.save())
        for contender in contenders.values():
            contender.stager.close()
    found = {name: medians(times) for name, times in rounds.items()}
    ratios = {name: round(value / max(found["one"][name], 0.01), 2)
              for name, value in found["many"].items()}  # fmt: skip
    document = {"unit": "ms", "count": options.count, "bytes each": options.bytes_each,
                "rounds": options.rounds, "first save": first, "later saves": found,
                "many / one": ratios}  # fmt: skip
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
