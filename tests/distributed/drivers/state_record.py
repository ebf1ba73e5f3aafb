"""Train cases on these ranks and write what their providers captured: `state_record.py OUT NAMES`.

Writes OUT/w<ranks>.pt: {case: {"start", "middle", "end": Snapshot, "losses", "independent"}}.
"""

from __future__ import annotations

import gc
import logging
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from state_gather import differences
from state_model import FULL_CASES, Case, build, train
from state_small import keep, settings
from state_snapshot import snapshot

from spotspeed.state.provider import provider_for

STEPS = 3
"""Steps before the snapshot in the middle, and again after it."""


def record(case: Case) -> dict[str, Any]:
    engine = build(case)
    provider = provider_for(engine)
    start = snapshot(provider)
    losses = train(engine, STEPS)
    middle = snapshot(provider)
    independent = differences(engine, middle.tensors)
    small = {"small": keep(engine, provider), "set": settings(engine)} if case.has_small else {}
    losses += train(engine, STEPS)
    result = {
        "start": start, "middle": middle, "end": snapshot(provider), "losses": losses,
        "independent": independent, "describe": provider.describe(), "name": provider.name,
        "set_at_end": settings(engine) if case.has_small else None, **small,
    }  # fmt: skip
    engine.destroy()
    return result


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2].split(",")
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo")
    gc.freeze()  # ZeRO-3 collects garbage as it starts; what is imported is none.
    results = {name: record(FULL_CASES[name]) for name in names}
    if deepspeed.comm.get_rank() == 0:
        torch.save(results, out / f"w{deepspeed.comm.get_world_size()}.pt")
    deepspeed.comm.barrier()


if __name__ == "__main__":
    main()
