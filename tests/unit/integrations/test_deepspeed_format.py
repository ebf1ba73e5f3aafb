"""DeepSpeed's files and layouts: hostile and incomplete ones are refused, arithmetic agrees."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from hypothesis import given
from hypothesis import strategies as st

from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.core.interval import Interval, gaps, overlaps
from spotspeed.core.layout import TensorKey
from spotspeed.errors import (
    ConfigError,
    FormatError,
    ObjectNotFoundError,
    SpotSpeedError,
    UnsupportedLayoutError,
)
from spotspeed.integrations.deepspeed_directory import open_directory
from spotspeed.integrations.deepspeed_files import read_file
from spotspeed.integrations.deepspeed_import import import_deepspeed
from spotspeed.integrations.deepspeed_layout import (
    FlatPartition,
    dealt_out,
    gathered,
    partitions_3,
    partitions_12,
)
from spotspeed.storage.local import LocalStorage


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


class ByName:
    """Stored as Python 3.11.0 to 3.11.3 stores the member of an enumeration."""

    def __init__(self, kind: Any, name: str) -> None:
        self.what = kind, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.what


def model_state(**changes: Any) -> dict[str, Any]:
    return {
        "module": {"w": torch.arange(6.0).view(2, 3)}, "buffer_names": [], "optimizer": None,
        "param_shapes": [{"w": torch.Size([2, 3])}], "frozen_param_shapes": None,
        "shared_params": {}, "frozen_param_fragments": None, "lr_scheduler": None,
        "skipped_steps": 0, "global_steps": 4, "global_samples": 8, "dp_world_size": 1,
        "mp_world_size": 1, "ds_config": {}, "ds_version": "0.19.8", **changes,
    }  # fmt: skip


def optimizer_state(**changes: Any) -> dict[str, Any]:
    base = {"state": {0: {"step": torch.tensor(4.0), "exp_avg": torch.arange(6.0)}},
            "param_groups": [{"lr": 0.1, "params": [0]}]}  # fmt: skip
    return {"optimizer_state_dict": {
        "base_optimizer_state": base, "single_partition_of_fp32_groups": [torch.arange(6.0)],
        "zero_stage": 2, "group_paddings": [0], **changes,
    }}  # fmt: skip


def write(root: Path, model: dict[str, Any], *optimizers: dict[str, Any]) -> Path:
    (root / "t").mkdir(parents=True)
    (root / "latest").write_text("t")
    torch.save(model, root / "t/mp_rank_00_model_states.pt")
    for rank, state in enumerate(optimizers):
        torch.save(state, root / f"t/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return root


@pytest.mark.parametrize("place", ["model", "optimizer"])
def test_code_in_a_file_is_not_run_and_its_type_is_named(tmp_path: Path, place: str) -> None:
    mark = tmp_path / "run"
    trap = {"client": Trap(mark)}
    source = write(tmp_path / "s", model_state(**(trap if place == "model" else {})),
                   optimizer_state(**(trap if place == "optimizer" else {})))  # fmt: skip
    named = r"_states\.pt: cannot be read without running code.*mkdir"
    with pytest.raises(FormatError, match=named) as error:
        import_deepspeed(source, LocalStorage(tmp_path / "c"))
    assert ("model_states" in str(error.value)) == (place == "model")
    assert not mark.exists() and not (tmp_path / "c").exists()


@pytest.mark.parametrize("stage", ZeroStageEnum)
def test_a_zero_stage_is_read_however_python_stores_it(
    tmp_path: Path, stage: ZeroStageEnum
) -> None:
    torch.save({"now": stage, "by_name": ByName(ZeroStageEnum, stage.name)}, tmp_path / "x.pt")
    assert read_file(tmp_path / "x.pt") == {"now": stage.value, "by_name": stage.value}


@pytest.mark.parametrize("what", [(ZeroStageEnum, "__class__"), (LossScaler, "backward"),
                                  (ZeroStageEnum.weights, "real"), (1, "real")])  # fmt: skip
def test_no_attribute_of_anything_else_is_looked_up(tmp_path: Path, what: Any) -> None:
    torch.save({"x": ByName(*what)}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match="without running code: it holds getattr"):
        read_file(tmp_path / "x.pt")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(FormatError, match=r"x\.pt"):
        read_file(path)
    torch.save([1], path)
    with pytest.raises(FormatError, match="a list, expected a dict"):
        read_file(path)


@pytest.mark.parametrize(
    ("model", "optimizers", "error", "text"),
    [
        ({"dp_world_size": 2}, [{}], ObjectNotFoundError, "of 2 ranks"),
        ({"mp_world_size": 2}, [{}], UnsupportedLayoutError, "model-parallel"),
        ({}, [], UnsupportedLayoutError, "optim_states"),
        ({}, [{"base_optimizer_state": [{}]}], UnsupportedLayoutError, "elastic_checkpoint"),
        ({}, [{"single_partition_of_fp32_groups": [torch.ones(5)]}], FormatError, "5 elements"),
        ({}, [{"single_partition_of_fp32_groups": []}], FormatError, "0 masters"),
        ({"param_shapes": None}, [{}], FormatError, "not laid out"),
        ({"global_steps": None}, [{}], FormatError, "not laid out"),
    ],
)
def test_what_is_incomplete_or_foreign_is_refused(
    tmp_path: Path, model: dict[str, Any], optimizers: list[dict[str, Any]],
    error: type[SpotSpeedError], text: str,
) -> None:  # fmt: skip
    states = [optimizer_state(**changes) for changes in optimizers]
    source = write(tmp_path / "s", model_state(**model), *states)
    with pytest.raises(error, match=text):
        import_deepspeed(source, LocalStorage(tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_a_missing_rank_and_a_foreign_file_are_named(tmp_path: Path) -> None:
    source = write(tmp_path, model_state(), *[optimizer_state()] * 3)
    (source / "t/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ObjectNotFoundError, match="rank 1 is missing"):
        open_directory(source)
    (source / "t/layer_00-model_states.pt").touch()
    with pytest.raises(UnsupportedLayoutError, match="layer_00"):
        open_directory(source)
    (source / "latest").write_text("../elsewhere")
    with pytest.raises(FormatError, match=r"latest: .* is not a name"):
        open_directory(source)
    with pytest.raises(ConfigError, match=r"tag .* is not a name"):
        open_directory(source, "../t")


def test_a_weight_that_is_not_its_master_is_kept(tmp_path: Path) -> None:
    module = {"w": torch.arange(6.0).view(2, 3) + 1}
    source = write(tmp_path / "s", model_state(module=module), optimizer_state())
    done = import_deepspeed(source, LocalStorage(tmp_path / "c"))
    reader = CheckpointReader(LocalStorage(tmp_path / "c"), done.manifest)
    key = TensorKey("weight", "w", "elements-0-6")
    assert reader.read_tensor(key).tolist() == [1, 2, 3, 4, 5, 6]
    assert reader.read_tensor(TensorKey("fp32", "w")).tolist() == [[0, 1, 2], [3, 4, 5]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 9),
       st.integers(0, 3), st.booleans())  # fmt: skip
def test_the_partitions_of_all_ranks_hold_every_element_once(
    sizes: list[int], ranks: int, cut: int, is_third: bool
) -> None:
    counts = {f"p{index}": size for index, size in enumerate(sizes)}
    names = list(counts)
    groups = [group for group in (names[:cut], names[cut:]) if group]
    found: dict[str, list[Interval]] = {name: [] for name in names}
    for rank in range(ranks):
        parts: list[FlatPartition] = (
            partitions_3(groups, counts, ranks, rank, 17) if is_third
            else partitions_12(groups, counts, ranks, rank)
        )  # fmt: skip
        for part in parts:
            inside = [Interval(s.offset, s.offset + s.interval.count) for s in part.spans]
            assert not overlaps(inside) and all(i.stop <= part.size for i in inside)
            for span in part.spans:
                found[span.name].append(span.interval)
    for name, intervals in found.items():
        assert not overlaps(intervals) and not gaps(Interval(0, counts[name]), intervals)


@given(st.integers(0, 30), st.integers(1, 9))
def test_what_was_dealt_out_is_gathered_again(count: int, ranks: int) -> None:
    names = [str(index) for index in range(count)]
    assert gathered(dealt_out(names, ranks), ranks) == names
