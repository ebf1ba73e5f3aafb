"""engine.save_checkpoint and load_checkpoint of divided models: `mesh_dropin.py FOLDER CASE ...`.

The cases are those of mesh_model.py, and two ways to share one model among ranks: hpZ, which keeps
a second copy of ZeRO-3's shards, and Ulysses, which divides the sequence.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import deepspeed
import mesh_model
import torch
from deepspeed import comm
from engines import RANK, WORLD_SIZE, Net
from engines import train as train_net

import spotspeed

FOLDER = Path(sys.argv[1])
CHANGES = {
    "hpz": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
    "ulysses": {"zero_optimization": {"stage": 3}, "data_parallel_size": WORLD_SIZE // 2,
                "sequence_parallel_size": 2},
}  # fmt: skip


def build_shared(name, path, *, seed):
    torch.manual_seed(seed)
    model = Net()
    config = {
        "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9, "spotspeed": {"path": path},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        **CHANGES[name],
    }  # fmt: skip
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


def main():
    deepspeed.init_distributed("gloo")
    for name in sys.argv[2:]:
        is_shared = name in CHANGES
        build = partial(build_shared if is_shared else mesh_model.build, name, str(FOLDER / name))
        train = train_net if is_shared else mesh_model.train
        engine = build(seed=11)
        comm_calls = watch_default_group()
        spotspeed.attach(engine)
        assert not comm_calls, f"{name}: attach has called {comm_calls} of the training's group"
        train(engine, 3)
        assert engine.save_checkpoint(str(FOLDER / "out" / name), client_state={"name": name})
        after = train(engine, 3)
        other = build(seed=12)
        spotspeed.attach(other)
        train(other, 1)
        path, client_state = other.load_checkpoint(str(FOLDER / "out" / name))
        assert path.endswith("spotspeed.json") and client_state == {"name": name}
        assert other.global_steps == 3
        assert train(other, 3) == after, name
        for one in (engine, other):
            one.destroy()
        print(f"rank {RANK}: {name}: held", flush=True)


def watch_default_group():
    """The collectives of objects that are called from now on, by name."""
    called = []
    for name in ("all_gather_object", "broadcast_object_list"):
        original = getattr(comm, name)
        setattr(comm, name, partial(note, called, name, original))
    return called


def note(called, name, original, *args, **kwargs):
    called.append(name)
    return original(*args, **kwargs)


if __name__ == "__main__":
    main()
