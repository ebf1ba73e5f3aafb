"""Train, save and load small engines, by spotspeed and by DeepSpeed: `exchange.py MODE OUT WHAT`.

    train OUT CASES             train each case, save it both ways, train on
    load OUT CASE:FOLDER,...    load what is in FOLDER by DeepSpeed's own load_checkpoint, train on
    restore OUT CASE:FOLDER,... restore what is in FOLDER by spotspeed, train on

Results go to OUT/MODE.pt by case: {"saved", "end": Snapshot, "losses", "step", "lr"}.
"""

from __future__ import annotations

import gc
import inspect
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from state_model import CASES, Case, build, train
from state_snapshot import snapshot

import spotspeed
from spotspeed.state import scaler
from spotspeed.state.provider import provider_for

DYNAMIC = replace(CASES["z2-fp32"], name="z2-dynamic", config={
    **CASES["z2-fp32"].config,
    "fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2, "hysteresis": 1},
})  # fmt: skip
"""fp16 with a loss scale that overflows first and moves within a few steps."""
STEPS = 3
"""Steps before the save, and again after it."""


def engine_of(name: str, *, seed: int, path: Path | None = None) -> Any:
    case: Case = CASES.get(name, DYNAMIC)
    config = {**case.config, "scheduler": {"type": "WarmupLR", "params": {
        "warmup_num_steps": 50, "warmup_max_lr": [2e-2, 1e-2, 3e-2]}}}  # fmt: skip
    if path is not None:
        config["spotspeed"] = {"path": str(path)}
    # An empty parameter cannot be on a ZeRO-3 module, so it is left to one case alone.
    return build(replace(case, config=config, with_empty=name == "z2-rr"), seed=seed)


def go_on(engine: Any) -> dict[str, Any]:
    """What the engine holds now, and what three more steps make of it."""
    provider = provider_for(engine)
    saved = snapshot(provider)
    result = {"saved": saved, "step": engine.global_steps, "lr": engine.get_lr(),
              "samples": engine.global_samples, "skipped": engine.skipped_steps,
              "scale": scaler.describe(scaler.capture(engine))}  # fmt: skip
    losses = train(engine, STEPS)
    return {**result, "losses": losses, "end": snapshot(provider)}


def do_train(out: Path, name: str) -> dict[str, Any]:
    engine = engine_of(name, seed=11, path=out / name / "ours")
    checkpointer = spotspeed.attach(engine)
    train(engine, STEPS)
    checkpointer.save("exchanged").wait(120)
    theirs = inspect.unwrap(deepspeed.DeepSpeedEngine.save_checkpoint)
    theirs(engine, str(out / name / "theirs"), tag="t", client_state={"note": 5})
    result = go_on(engine)
    checkpointer.close()
    engine.destroy()
    return result


def do_load(folder: Path, name: str) -> dict[str, Any]:
    engine = engine_of(name, seed=99)
    path, _ = engine.load_checkpoint(str(folder))
    assert path is not None
    result = go_on(engine)
    engine.destroy()
    return result


def do_restore(folder: Path, name: str) -> dict[str, Any]:
    engine = engine_of(name, seed=99, path=folder)
    checkpointer = spotspeed.attach(engine)
    restored = checkpointer.restore()
    assert restored is not None and restored.client_state == {"note": 5}
    result = go_on(engine)
    checkpointer.close()
    engine.destroy()
    return result


def main() -> None:
    mode, out, words = sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(",")
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo")
    gc.freeze()  # ZeRO-3 collects garbage as it starts; what is imported is none.
    results: dict[str, Any] = {}
    for word in words:
        name, _, folder = word.partition(":")
        if mode == "train":
            results[word] = do_train(out, name)
        else:
            results[word] = (do_load if mode == "load" else do_restore)(out / folder, name)
    if deepspeed.comm.get_rank() == 0:
        ranks = deepspeed.comm.get_world_size()
        torch.save(results, out / f"{mode}-{ranks}.pt")
    deepspeed.comm.barrier()


if __name__ == "__main__":
    main()
