"""Checks of dropin.py that are about the moment at which something is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

from engines import make, micro_step, raises, train

import spotspeed

FOLDER = Path(sys.argv[1])


def check_what_is_still_being_saved_is_finished_before_it_is_looked_for() -> None:
    engine, folder = make(1, FOLDER / "flight"), FOLDER / "flight-out"
    train(engine, 1)
    spotspeed.async_save(engine, folder, client_state={"n": 1})
    assert engine.load_checkpoint(folder)[1] == {"n": 1}
    spotspeed.save(engine, folder, "x")
    for step in (2, 3):
        train(engine, 1)
        spotspeed.async_save(engine, folder, "x")
        assert spotspeed.load(engine, folder, "x").step == step, "and not what it replaces"
    engine.destroy()


def check_a_loader_that_finds_nothing_begins_no_branch() -> None:
    engine = make(1, FOLDER / "nothing")
    train(engine, 2)
    spotspeed.save(engine, tag="mine")
    (FOLDER / "nothing-out").mkdir(exist_ok=True)
    for tag in ("best", "global_step9"):
        raises(Exception, lambda tag=tag: engine.load_checkpoint(FOLDER / "nothing-out", tag=tag))
    assert not list((FOLDER / "nothing" / "epochs").glob("000002*")), "the same epoch as before"
    train(engine, 1)
    spotspeed.save(engine, tag="later")
    listed = [info.tag for info in spotspeed.list_checkpoints(str(FOLDER / "nothing"))]
    assert listed == ["later", "mine"], listed
    engine.destroy()


def check_a_load_in_the_middle_of_an_accumulation_forgets_its_gradients() -> None:
    bf16 = {"bf16": {"enabled": True}}
    offloaded = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                 "zero_force_ds_cpu_optimizer": False}  # fmt: skip
    for number, (stage, changes) in enumerate(
        ((0, {}), (0, bf16), (1, bf16), (2, {}), (3, {}), (2, offloaded))
    ):
        path = FOLDER / f"middle{number}"
        engine = make(stage, path, **changes)
        train(engine, 3)
        engine.save_checkpoint(path / "out")
        after = train(engine, 2)
        for middle in (1, 2):
            engine.load_checkpoint(path / "out")
            for _ in range(middle):
                micro_step(engine)
            engine.load_checkpoint(path / "out")
            assert train(engine, 2) == after, (number, middle)
        engine.destroy()
