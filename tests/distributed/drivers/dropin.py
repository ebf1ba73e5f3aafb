"""engine.save_checkpoint and load_checkpoint of attached engines; asserts, prints what held."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import torch
from dropin_moments import (
    check_a_load_in_the_middle_of_an_accumulation_forgets_its_gradients,
    check_a_loader_that_finds_nothing_begins_no_branch,
    check_what_is_still_being_saved_is_finished_before_it_is_looked_for,
)
from engines import RANK, WORLD_SIZE, main, make, micro_step, raises, train

import spotspeed
from spotspeed.errors import (
    CaptureError,
    ConfigError,
    CorruptionError,
    InvalidLayoutError,
    ObjectNotFoundError,
)
from spotspeed.integrations import deepspeed_consolidate, deepspeed_universal
from spotspeed.integrations.deepspeed_universal import point

FOLDER = Path(sys.argv[1])
__all__ = [
    "check_a_load_in_the_middle_of_an_accumulation_forgets_its_gradients",
    "check_a_loader_that_finds_nothing_begins_no_branch",
    "check_what_is_still_being_saved_is_finished_before_it_is_looked_for",
]


def check_another_engine_loads_at_once_and_goes_on_alike() -> None:
    for stage in (0, 1, 2, 3):
        folder = FOLDER / f"stage{stage}"
        engine = make(stage, FOLDER / "one")
        train(engine, 3)
        state = {"epoch": 3, "t": torch.arange(3), "pair": (1, {2: "b"}),
                 "ema": torch.arange(400_000.0)}  # fmt: skip
        assert engine.save_checkpoint(folder, client_state=state) is True
        after = train(engine, 3)
        other = make(stage, FOLDER / "one", seed=2)
        path, client_state = other.load_checkpoint(str(folder))
        assert path.startswith(str(folder / "global_step3"))
        assert client_state["pair"] == (1, {2: "b"}) and client_state["t"].tolist() == [0, 1, 2]
        assert torch.equal(client_state["ema"], state["ema"])
        assert (other.global_steps, other.global_samples) == (3, 18)
        assert train(other, 3) == after
        assert other.lr_scheduler.get_last_lr() == engine.lr_scheduler.get_last_lr()
        engine.load_checkpoint(folder)
        assert train(engine, 3) == after, "back, in the same engine"
        engine.destroy()
        other.destroy()


def check_half_precision_and_bare_optimizers() -> None:
    bf16 = {"bf16": {"enabled": True}}
    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    cases = ((1, bf16), (3, bf16), (0, {"optimizer": momentum}), (1, {"optimizer": momentum}))
    for number, (stage, changes) in enumerate(cases):
        path = FOLDER / f"case{number}"
        engine = make(stage, path, **changes)
        train(engine, 2)
        engine.save_checkpoint(path / "out")
        after = train(engine, 3)
        other = make(stage, path, seed=2, **changes)
        train(other, 1)
        other.load_checkpoint(path / "out")
        assert train(other, 3) == after, number
        engine.destroy()
        other.destroy()


def check_any_moment_can_be_saved() -> None:
    engine = make(1, FOLDER / "moment")
    engine.save_checkpoint(FOLDER / "moment-out")
    first = train(engine, 2)
    engine.micro_steps = 0
    micro_step(engine)
    engine.save_checkpoint(FOLDER / "moment-out")
    other = make(2, FOLDER / "moment", seed=2)
    other.load_checkpoint(FOLDER / "moment-out", "global_step0")
    assert other.global_steps == 0 and train(other, 2) == first
    other.load_checkpoint(FOLDER / "moment-out")
    assert other.global_steps == 2
    other.save_checkpoint(FOLDER / "moment-out", "again")
    assert _masters(FOLDER / "moment", FOLDER / "moment-out", "again") == _masters(
        FOLDER / "moment", FOLDER / "moment-out", "global_step2"
    )
    engine.destroy()
    other.destroy()


def check_the_same_save_twice_is_stored_once() -> None:
    engine = make(2, FOLDER / "twice")
    train(engine, 1)
    for _ in range(2):
        engine.save_checkpoint(FOLDER / "twice-out", "tag", client_state={"a": 1})
    first = spotspeed.list_checkpoints(str(FOLDER / "twice"))
    engine.save_checkpoint(FOLDER / "twice-out", "tag", client_state={"a": 2})
    second = spotspeed.list_checkpoints(str(FOLDER / "twice"))
    assert len(first) == 1 and len(second) == 1 and first != second, "written over"
    engine.save_checkpoint(FOLDER / "twice-out", "other", client_state={"a": 2}, save_latest=False)
    assert (FOLDER / "twice-out" / "latest").read_text() == "tag"
    assert len(spotspeed.list_checkpoints(str(FOLDER / "twice"))) == 2
    assert engine.load_checkpoint(FOLDER / "twice-out")[1] == {"a": 2}
    engine.destroy()


def check_the_directory_may_be_the_catalogue_itself() -> None:
    engine = make(2, FOLDER / "same")
    train(engine, 1)
    engine.save_checkpoint(FOLDER / "same", client_state={"at": 1})
    train(engine, 1)
    spotspeed.save(engine)
    path, client_state = engine.load_checkpoint(FOLDER / "same")
    assert path.endswith("global_step1/spotspeed.json") and client_state == {"at": 1}
    engine.destroy()


def check_wrong_and_missing_directories() -> None:
    engine = make(0, FOLDER / "wrong")
    for nothing in (None, ""):
        raises(ValueError, lambda path=nothing: engine.save_checkpoint(path))
    assert engine.load_checkpoint(FOLDER / "nowhere") == (None, None)
    bad = {"list": [1, object()]}
    error = raises(CaptureError, lambda: engine.save_checkpoint(FOLDER / "w", client_state=bad))
    assert "client_state['list'][1]" in str(error)
    for bad in (5, "text", [("a", 1)]):
        raises(CaptureError, lambda bad=bad: engine.save_checkpoint(FOLDER / "w", client_state=bad))
    assert not (FOLDER / "w").exists()
    for tag in ("..", "../up", "/etc/x", "a\0b", "", "x" * 300):
        raises(ConfigError, lambda tag=tag: engine.save_checkpoint(FOLDER / "tags", tag))
    (FOLDER / "empty").mkdir(exist_ok=True)
    for nothing in (" ", "\0" * 12, "no-such-tag"):
        (FOLDER / "empty" / "latest").write_text(nothing)
        raises(CorruptionError, lambda: engine.load_checkpoint(FOLDER / "empty"))
    (FOLDER / "file").write_text("of the user")
    for folder in (FOLDER / "file", FOLDER / "file" / "below", "/proc/spotspeed", "nope://x/y"):
        raises(ConfigError, lambda folder=folder: engine.save_checkpoint(folder))
    for folder in (5, b"bytes", object()):
        raises(TypeError, lambda folder=folder: engine.save_checkpoint(folder))
        raises(TypeError, lambda folder=folder: engine.load_checkpoint(folder))
    assert not spotspeed.list_checkpoints(str(FOLDER / "wrong")), "nothing was stored for them"
    for tag in (7, "épöque 3", "deep/er"):
        assert engine.save_checkpoint(FOLDER / "tags", tag)
        found, _ = engine.load_checkpoint(FOLDER / "tags")
        assert found == str(FOLDER / "tags" / str(tag) / "spotspeed.json"), found
    engine.destroy()


def check_parts_of_a_checkpoint() -> None:
    engine = make(1, FOLDER / "parts")
    train(engine, 3)
    engine.save_checkpoint(FOLDER / "parts-out", client_state={"k": 1})
    weights = engine.module.state_dict()
    for changes in ({"load_optimizer_states": False}, {"load_module_only": True}):
        other = make(1, FOLDER / "parts", seed=2)
        _, client_state = other.load_checkpoint(FOLDER / "parts-out", **changes)
        assert client_state == {"k": 1}
        for name, tensor in other.module.state_dict().items():
            assert torch.equal(tensor, weights[name]), name
        assert other.global_steps == (0 if "load_module_only" in changes else 3)
        moments = [value for state in other.optimizer.optimizer.state.values()
                   for key, value in state.items() if key == "exp_avg"]  # fmt: skip
        assert not any(bool(moment.any()) for moment in moments)
        train(other, 1)
        other.destroy()
    bigger = make(1, FOLDER / "parts", seed=2, extra=True)
    load = bigger.load_checkpoint
    raises(InvalidLayoutError, lambda: load(FOLDER / "parts-out"))
    extra = bigger.module.extra.weight.clone()
    load(FOLDER / "parts-out", load_module_strict=False, load_optimizer_states=False)
    assert torch.equal(bigger.module.extra.weight, extra)
    assert torch.equal(bigger.module.body[0].weight, weights["body.0.weight"])
    train(bigger, 1)
    engine.save_checkpoint(FOLDER / "parts-out", "thin", exclude_frozen_parameters=True)
    thin = spotspeed.open_checkpoint(str(FOLDER / "parts"), "thin")
    assert not [name for name in thin.parameters() if name.startswith("frozen.")]
    other = make(1, FOLDER / "parts", seed=3)
    frozen = other.module.frozen.weight.clone()
    other.load_checkpoint(FOLDER / "parts-out", "thin", load_module_strict=False)
    assert torch.equal(other.module.frozen.weight, frozen)
    for each in (engine, bigger, other):
        each.destroy()


def check_tags_that_differ() -> None:
    for mode in ("Ignore", "Warn", "Fail"):
        engine = make(1, FOLDER / "tags", checkpoint={"tag_validation": mode})
        save = partial(engine.save_checkpoint, FOLDER / "tags-out", tag=f"t{RANK}")
        if mode == "Fail" and WORLD_SIZE > 1:
            raises(AssertionError, save)
        else:
            assert save()
        engine.destroy()


def check_damage_is_an_error_and_nothing_goes_on_from_it() -> None:
    engine = make(2, FOLDER / "damage")
    for _ in range(2):
        train(engine, 1)
        engine.save_checkpoint(FOLDER / "damage-out")
    after = train(engine, 1)
    last = WORLD_SIZE - 1
    if RANK == 0:
        # The last rank alone meets this; all others have filled their part by then.
        damage(next((FOLDER / "damage").glob(f"step-*2.*/rank-{last:05d}.shard")), 4096)
    raises(CorruptionError, lambda: engine.load_checkpoint(FOLDER / "damage-out"))
    for action in (train, lambda engine, _: engine.save_checkpoint(FOLDER / "damage-out")):
        error = raises(CorruptionError, lambda action=action: action(engine, 1))
        assert "load another" in str(error), error
    raises(ObjectNotFoundError, lambda: spotspeed.load(engine, tag="nowhere"))
    raises(CorruptionError, lambda: train(engine, 1))
    engine.load_checkpoint(FOLDER / "damage-out", "global_step1")
    assert train(engine, 2)[1:] == after
    engine.destroy()
    lost = make(2, FOLDER / "damage", seed=2)
    raises(CorruptionError, lambda: lost.load_checkpoint(FOLDER / "damage-out", "global_step2"))
    lost.destroy()


def check_what_cannot_be_loaded_changes_nothing() -> None:
    engine = make(1, FOLDER / "kept")
    train(engine, 2)
    engine.save_checkpoint(FOLDER / "kept-out")
    other = make(1, FOLDER / "others", extra=True)
    other.save_checkpoint(FOLDER / "kept-out", "other")
    if RANK == 0:
        damage(next((FOLDER / "others").glob("step-*/manifest.json")), 20)
    spotspeed.save(engine, tag="mine")
    raises(CorruptionError, lambda: engine.load_checkpoint(FOLDER / "kept-out", "other"))
    raises(InvalidLayoutError, lambda: other.load_checkpoint(FOLDER / "kept-out", "global_step2"))
    train(engine, 1)
    spotspeed.save(engine, tag="later")
    listed = [info.tag for info in spotspeed.list_checkpoints(str(FOLDER / "kept"))]
    assert listed == ["later", "mine", "global_step2"], "the same branch as before"
    other.destroy()
    engine.destroy()


def check_a_universal_engine_loads_what_was_saved_here() -> None:
    engine = make(3, FOLDER / "universal")
    train(engine, 2)
    engine.save_checkpoint(FOLDER / "universal-out", client_state={"k": 1})
    after = train(engine, 2)
    other = make(1, FOLDER / "universal", seed=2, checkpoint={"load_universal": True})
    raises(ValueError, lambda: other.load_checkpoint(FOLDER / "nowhere"))
    assert other.load_checkpoint(FOLDER / "universal-out")[1] == {"k": 1}
    assert other.global_steps == 2 and torch.allclose(*map(torch.tensor, (train(other, 2), after)))
    engine.destroy()
    other.destroy()


def check_what_ds_to_universal_is_asked_to_convert_loads_as_it_is() -> None:
    from deepspeed.checkpoint.ds_to_universal import main as convert

    deepspeed_universal.plug_in()  # Those who have the function already have it so, too.
    deepspeed_universal.plug_in()
    engine, folder = make(3, FOLDER / "convert"), FOLDER / "convert-out"
    train(engine, 2)
    engine.save_checkpoint(folder, "mine")
    after = train(engine, 2)
    universal = folder / "mine_universal"
    if RANK == 0:
        convert(SimpleNamespace(input_folder=str(folder / "mine"), output_folder=str(universal)))
        assert not point(folder, universal), "what has no marker is DeepSpeed's to convert"
        assert (folder / "latest_universal").read_text() == "mine_universal"
    other = make(1, FOLDER / "convert", seed=2, checkpoint={"load_universal": True})
    path, _ = other.load_checkpoint(folder)
    assert path == str(universal / "spotspeed.json") and other.global_steps == 2
    assert torch.allclose(*map(torch.tensor, (train(other, 2), after)))
    engine.destroy()
    other.destroy()


def check_the_parameters_are_left_as_deepspeed_leaves_them() -> None:
    states = []
    for path in (None, FOLDER / "left"):
        engine = make(3, path)
        train(engine, 1)
        engine.empty_partition_cache()
        engine.save_checkpoint(FOLDER / "left-out", tag=f"{path is None}")
        states.append([p.ds_status.name for p in engine.module.parameters()])
        engine.destroy()
    assert states[0] == states[1] and "AVAILABLE" in states[0], states


def check_deepspeed_makes_one_state_dict_of_what_was_saved_here() -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as merge

    deepspeed_consolidate.plug_in()
    for stage in (1, 3):
        engine, bf16 = make(stage, FOLDER / "merge", bf16={"enabled": True}), torch.bfloat16
        train(engine, 1)
        folder = FOLDER / f"merge-out{stage}"
        engine.save_checkpoint(folder)
        engine.save_checkpoint(folder, "thin", exclude_frozen_parameters=True, save_latest=False)
        whole, thin = merge(folder), merge(folder, "thin")
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            live = {name: value.clone() for name, value in engine.module.named_parameters()}
        assert {name: value.dtype for name, value in whole.items()} == dict.fromkeys(
            live, torch.float32
        )
        assert all(torch.equal(whole[name].to(bf16), value) for name, value in live.items())
        assert set(thin) == {name for name in live if not name.startswith("frozen.")}
        engine.destroy()
    plain = make(1)
    plain.save_checkpoint(FOLDER / "merge-plain")
    assert "body.0.weight" in merge(FOLDER / "merge-plain"), "its own files, as ever"
    plain.destroy()


def check_without_a_marker_deepspeed_loads_its_own() -> None:
    plain = make(1)
    train(plain, 2)
    plain.save_checkpoint(FOLDER / "plain-out", client_state={"from": "deepspeed"})
    after = train(plain, 2)
    engine = make(1, FOLDER / "plain", seed=2)
    train(engine, 1)
    path, client_state = engine.load_checkpoint(FOLDER / "plain-out")
    assert path.endswith(".pt") and client_state["from"] == "deepspeed"
    assert engine.global_steps == 2 and train(engine, 2) == after
    engine.save_checkpoint(FOLDER / "plain-out")
    assert engine.load_checkpoint(FOLDER / "plain-out")[0].endswith(".json")
    plain.destroy()
    engine.destroy()


def check_engines_with_one_path_do_not_mix() -> None:
    engines = [make(stage, FOLDER / "many", seed=stage) for stage in (0, 1)]
    losses = []
    for index, engine in enumerate(engines):
        train(engine, 2 + index)
        engine.save_checkpoint(FOLDER / f"many-{index}")
    for index, engine in reversed(list(enumerate(engines))):
        losses.append(train(engine, 1))
        engine.load_checkpoint(FOLDER / f"many-{index}")
        assert engine.global_steps == 2 + index and train(engine, 1) == losses[-1]
    for engine in engines:
        engine.destroy()


def check_a_load_further_back_begins_another_branch() -> None:
    engine = make(2, FOLDER / "back")
    for _ in range(3):
        train(engine, 1)
        engine.save_checkpoint(FOLDER / "back-out")
    engine.load_checkpoint(FOLDER / "back-out", "global_step1")
    train(engine, 1)
    engine.save_checkpoint(FOLDER / "back-out", "branch")
    listed = spotspeed.list_checkpoints(str(FOLDER / "back"))
    assert [info.tag for info in listed] == ["branch", "global_step1"], "not the abandoned future"
    assert (FOLDER / "back-out" / "latest").read_text() == "branch"
    engine.load_checkpoint(FOLDER / "back-out", "global_step3")
    assert engine.global_steps == 3, "by name it can still be had"
    engine.destroy()


def damage(file: Path, offset: int) -> None:
    """Flip one bit."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def _masters(catalogue: Path, folder: Path, tag: str) -> dict[str, list[float]]:
    """All trained state that `tag` in `folder` stands for, by name and kind."""
    assert (folder / tag / "spotspeed.json").exists()
    opened = spotspeed.open_checkpoint(str(catalogue), tag)
    return {f"{name} {kind}": opened.read(name, kind).ravel().tolist()
            for name in opened.parameters() for kind in opened.kinds(name)}  # fmt: skip


if __name__ == "__main__":
    wanted = sys.argv[2:]
    main([check for name, check in list(globals().items())
          if name.startswith("check_") and (not wanted or name in wanted)])  # fmt: skip
