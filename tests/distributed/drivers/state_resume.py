"""Put recorded states into fresh engines and train on: `state_resume.py DIR PAIRS_JSON OUT`.

A pair is [ranks, source case, target case, moment, way]: `moment` is "start" or "middle"; `way` is
"fresh", "used" (the engine has trained before) or the name of a kind that is not restored.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from state_gather import differences
from state_model import FULL_CASES, build, train
from state_record import STEPS
from state_small import put_back, settings
from state_snapshot import Snapshot, restore, snapshot

from spotspeed.errors import ReshardError
from spotspeed.state.provider import provider_for


def resume(source: dict[str, Any], target: str, moment: str, way: str) -> dict[str, Any]:
    state: Snapshot = source[moment]
    has_small = FULL_CASES[target].has_small and moment == "middle"
    engine = build(FULL_CASES[target], seed=99, rate=3.0 if has_small else 1.0)
    if way == "used":
        train(engine, 2)
    provider = provider_for(engine)
    try:
        restore(provider, state, but=None if way in ("fresh", "used") else way)
    except ReshardError as error:
        engine.destroy()
        return {"error": f"{type(error).__name__}: {error}"}
    engine.global_steps = 0 if moment == "start" else STEPS
    if has_small:
        put_back(engine, provider, source["small"])
    was_set = settings(engine) if has_small else None
    restored = snapshot(provider)
    independent = differences(engine, restored.tensors) if way == "fresh" else (0, [])
    losses = train(engine, STEPS)
    result = {"restored": restored, "losses": losses, "end": snapshot(provider),
              "independent": independent, "set": was_set,
              "set_at_end": settings(engine) if has_small else None}  # fmt: skip
    engine.destroy()
    return result


def main() -> None:
    folder, pairs, out = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), sys.argv[3]
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo")
    gc.freeze()  # ZeRO-3 collects garbage as it starts; what is imported is none.
    recorded = {
        path.stem: torch.load(path, weights_only=False) for path in folder.glob("w[0-9]*.pt")
    }
    results = {
        tuple(pair): resume(recorded[f"w{pair[0]}"][pair[1]], pair[2], *pair[3:]) for pair in pairs
    }
    if deepspeed.comm.get_rank() == 0:
        torch.save(results, out)
    deepspeed.comm.barrier()


if __name__ == "__main__":
    main()
