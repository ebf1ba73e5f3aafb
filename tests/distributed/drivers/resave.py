"""Restore on this number of ranks and save at once: `resave.py CONFIG TAG`."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import deepspeed
import torch

import spotspeed
from tests.ranks import ROOT


def build_engine(config: Any, *, width: int = 64, seed: int = 99) -> Any:
    """The example's model, with other initial weights than the run that is resumed."""
    spec = importlib.util.spec_from_file_location("train_gpt", ROOT / "examples/train_gpt.py")
    assert spec is not None and spec.loader is not None
    train_gpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_gpt)
    deepspeed.init_distributed(distributed_port=int(os.environ["MASTER_PORT"]))
    torch.manual_seed(seed)
    model = train_gpt.GPT(width, 2, 32, 0.1)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def main() -> None:
    engine = build_engine(sys.argv[1])
    checkpointer = spotspeed.attach(engine)
    restored = checkpointer.restore()
    assert restored is not None and restored.step == engine.global_steps
    checkpointer.save(sys.argv[2]).wait(120)
    checkpointer.close()


if __name__ == "__main__":
    main()
