"""The hooks on real engines: when they fire, what they leave alone; asserts, prints what it did."""

from __future__ import annotations

import inspect
import itertools
import sys
import tempfile
from pathlib import Path

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch.utils.data import DataLoader

import spotspeed
from spotspeed.errors import ConfigError
from spotspeed.state import boundary
from spotspeed.state.boundary import PASS

NAMES = ("__init__", "_take_model_step", "forward", "save_checkpoint", "load_checkpoint", "destroy")


class Hooks:
    def __init__(self):
        self.seen, self.answer = [], PASS

    def before_update(self, engine):
        self.seen.append(("before", engine.global_steps, bool(engine.skipped_steps)))

    def after_update(self, engine):
        self.seen.append(("after", engine.global_steps, bool(engine.skipped_steps)))

    def before_forward(self, engine):
        self.seen.append("forward")

    def on_save(self, engine, arguments):
        self.seen.append(("save", arguments["tag"], arguments["client_state"]))
        return self.answer

    def on_load(self, engine, arguments, original):
        self.seen.append(("load", arguments["tag"], arguments["load_lr_scheduler_states"]))
        return self.answer

    def on_destroy(self, engine):
        self.seen.append("destroy")


def config(**changes):
    return {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}, **changes,
    }  # fmt: skip


def make(**changes):
    model = torch.nn.Linear(4, 1)
    return deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config(**changes)
    )[0]


def micro_step(engine, factor=1.0):
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(torch.ones(2, 4, dtype=dtype)).float().mean() * factor)
    engine.step()


def check_signatures() -> None:
    before = {name: inspect.signature(getattr(DeepSpeedEngine, name)) for name in NAMES}
    boundary.install_hooks()
    wrapped = {name: getattr(DeepSpeedEngine, name) for name in NAMES}
    boundary.install_hooks()
    for name in NAMES:
        assert inspect.signature(getattr(DeepSpeedEngine, name)) == before[name], name
        assert getattr(DeepSpeedEngine, name) is wrapped[name], name
    assert "exclude_frozen_parameters" in inspect.signature(
        DeepSpeedEngine.save_checkpoint).parameters  # fmt: skip


def check_engine() -> None:
    made = []
    stop = boundary.on_new_engine(made.append)
    engine, other = make(zero_optimization={"stage": 2}, bf16={"enabled": True}), make()
    assert made == [engine, other]
    stop()
    hooks = Hooks()
    binding = boundary.bind(engine, hooks)
    for _ in range(2):
        micro_step(engine)
        micro_step(other)
    binding.watches_forward = True
    micro_step(engine)
    binding.watches_forward = False
    micro_step(engine)
    assert hooks.seen == [("before", 0, False), ("after", 1, False), "forward",
                          ("before", 1, False), ("after", 2, False)], hooks.seen  # fmt: skip
    check_saving(engine, hooks)
    engine.destroy()
    other.destroy()
    assert hooks.seen == ["destroy"]


def check_saving(engine, hooks) -> None:
    hooks.seen.clear()
    with tempfile.TemporaryDirectory() as directory:
        engine.save_checkpoint(directory, "real", {"a": 1})
        assert Path(directory, "real").is_dir()
        path, client_state = engine.load_checkpoint(directory, load_lr_scheduler_states=False)
        assert path is not None and client_state["a"] == 1
        hooks.answer = "ours"
        assert engine.save_checkpoint(directory, tag="not-written") == "ours"
        assert not Path(directory, "not-written").exists()
        assert engine.load_checkpoint(directory, tag="not-there") == "ours"
    expected = [("save", "real", {"a": 1}), ("load", None, False), ("save", "not-written", {}),
                ("load", "not-there", True)]  # fmt: skip
    assert hooks.seen == expected, hooks.seen
    hooks.seen.clear()


def check_overflow() -> None:
    engine = make(fp16={"enabled": True, "initial_scale_power": 4, "hysteresis": 1},
                  zero_optimization={"stage": 1})  # fmt: skip
    hooks = Hooks()
    boundary.bind(engine, hooks)
    for _ in range(2):
        micro_step(engine, float("inf"))
    assert hooks.seen == [("before", 0, False), ("after", 1, True)], hooks.seen
    engine.destroy()


def check_pipeline() -> None:
    made = []
    stop = boundary.on_new_engine(lambda engine: made.append(engine.micro_batches))
    layers = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)]
    model = PipelineModule(layers, num_stages=1, loss_fn=lambda out, _: out.mean())
    engine = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config()
    )[0]
    stop()
    assert type(engine) is PipelineEngine and made == [2]
    hooks = Hooks()
    boundary.bind(engine, hooks)
    batches = iter([(torch.ones(2, 4), torch.ones(2, 1))] * 4)
    for _ in range(2):
        engine.train_batch(batches)
    assert hooks.seen == [("before", 0, False), ("after", 1, False), ("before", 1, False),
                          ("after", 2, False)], hooks.seen  # fmt: skip
    engine.destroy()


def check_epochs() -> None:
    """A plain loop over a DataLoader goes on bit for bit before, at and after an epoch's end."""
    with tempfile.TemporaryDirectory() as directory:
        whole, restored = train_epochs(directory, None)
        assert restored is None and len(whole) == 8
        for cut in (3, 4, 5):
            for is_load in (False, True):
                resumed = train_epochs(directory, f"step-{cut}", is_load=is_load)
                assert resumed == (whole[cut:], cut), (cut, is_load)


def train_epochs(directory, tag, *, is_load=False):
    """Two epochs of four steps under dropout, or what is left of them."""
    block = {"path": directory, "interval": {"steps": 1, "seconds": None}, "keep": {"last": 99}}
    torch.manual_seed(5)
    engine = make(spotspeed=block, gradient_accumulation_steps=1)
    checkpointer, losses = spotspeed.attach(engine), []
    restored = spotspeed.load(engine, tag=tag) if is_load else checkpointer.restore(tag)
    torch.manual_seed(6) if restored is None else None
    for _ in range(engine.global_steps // 4, 2):
        loader = DataLoader(list(range(8)), batch_size=2)
        for batch in itertools.islice(loader, engine.global_steps % 4, None):
            inputs = torch.nn.functional.dropout(batch[:, None].expand(2, 4) + 1.0, 0.5)
            loss = engine(inputs).mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    checkpointer.close()
    engine.destroy()
    return losses, None if restored is None else restored.step


def check_batches() -> None:
    """One call of batches() an epoch, with the loader of `training_data`, in several launches."""
    with tempfile.TemporaryDirectory() as directory:
        steps = train_batches(directory, 4) + train_batches(directory, 6) + train_batches(directory)
    assert [len(step) for step in steps] == [4, 4, 2] * 3, steps
    for epoch in range(3):
        seen = [sample for step in steps[3 * epoch : 3 * epoch + 3] for sample in step]
        assert sorted(seen) == list(range(10)) and seen != sorted(seen), steps


def check_a_load_among_batches() -> None:
    """What batches() has begun is over when another state is loaded; a new call goes on from it."""
    with tempfile.TemporaryDirectory() as directory:
        engine, checkpointer = begin_batches(directory)
        samples, batches = [], checkpointer.batches()
        for number, batch in enumerate(itertools.islice(batches, 4)):
            samples.append(batch)
            engine.backward(engine(batch).mean())
            engine.step()
            if number == 1:
                spotspeed.save(engine, tag="one")
        spotspeed.load(engine, tag="one")
        try:
            next(batches)
        except ConfigError as error:
            assert "call batches() again" in str(error), error
        else:
            raise AssertionError("went on with the samples of another state")
        again = list(itertools.islice(checkpointer.batches(), 2))
        assert all(map(torch.equal, again, samples[2:4])), (again, samples)
        checkpointer.close()
        engine.destroy()


def begin_batches(directory):
    model = torch.nn.Linear(1, 1)
    engine, _, loader, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(),
        training_data=[torch.tensor([float(number)]) for number in range(10)],
        config=config(spotspeed={"path": directory, "interval": {"seconds": None}}),
    )  # fmt: skip
    checkpointer = spotspeed.attach(engine, loader=loader)
    checkpointer.restore()
    return engine, checkpointer


def train_batches(directory, stop_at=None):
    """The samples of each step, of three epochs or until `stop_at`."""
    engine, checkpointer = begin_batches(directory)
    steps = []
    for _ in range(3):
        for batch in checkpointer.batches():
            if engine.micro_steps % 2 == 0:
                steps.append([])
            steps[-1] += batch.flatten().int().tolist()
            engine.backward(engine(batch).mean())
            engine.step()
            if engine.global_steps == stop_at:
                checkpointer.close()
                engine.destroy()
                return steps
    checkpointer.close()
    engine.destroy()
    return steps


def main() -> None:
    from deepspeed.accelerator import get_accelerator

    # The CPU accelerator computes in fp16 but does not say so.
    get_accelerator().is_fp16_supported = lambda: True
    check_signatures()
    deepspeed.init_distributed("gloo")
    for check in (check_engine, check_overflow, check_pipeline, check_epochs, check_batches,
                  check_a_load_among_batches):  # fmt: skip
        check()
        sys.stdout.write(f"rank 0: {check.__name__}: ok\n")


if __name__ == "__main__":
    main()
