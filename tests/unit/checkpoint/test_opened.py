"""A checkpoint is opened by path and read by parameter name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from spotspeed.checkpoint.opened import list_checkpoints, open_checkpoint
from spotspeed.core.layout import TensorKey
from spotspeed.errors import InvalidLayoutError, ObjectNotFoundError


@pytest.fixture
def written(checkpoint_factory):
    return checkpoint_factory(3)


def test_parameters_and_kinds_are_listed(written):
    opened = open_checkpoint(str(written.root))
    assert (opened.tag, opened.step, opened.world_size) == ("global_step10", 10, 3)
    assert opened.parameters() == sorted(
        ["embed.weight", "layers.0.weight", "layers.0.bias", "layers.10.weight", "norm.scale",
         "frozen.weight", "empty"]
    )  # fmt: skip
    assert opened.kinds("embed.weight") == ["fp32", "exp_avg", "exp_avg_sq", "step"]
    assert opened.kinds("frozen.weight") == ["weight"]
    assert opened.kinds("positions") == ["buffer"]
    assert opened.shape("embed.weight", "exp_avg") == (61, 17)
    assert opened.dtype("frozen.weight", "weight") == "bfloat16"


def test_a_parameter_is_read_whole_and_in_part(written):
    opened = open_checkpoint(str(written.root), "global_step10")
    values = written.tensors[TensorKey("fp32", "layers.0.weight")][1]
    assert np.array_equal(opened.read("layers.0.weight", "fp32"), values)
    assert np.array_equal(opened.read("layers.0.weight", "fp32", 7, 900), values.ravel()[7:900])
    assert opened.read("positions", "buffer").tolist() == list(range(37))
    assert opened.read("positions", "buffer", scope="rank-0").dtype == np.int64


def test_reading_many_parameters_looks_through_their_names_once(written, monkeypatch):
    opened = open_checkpoint(str(written.root))
    looks = []

    class Watched(dict):
        def __iter__(self):
            looks.append(1)
            return super().__iter__()

    tensors = Watched(opened.reader.tensors())
    monkeypatch.setattr(opened.reader, "tensors", lambda: tensors)
    for name in opened.parameters() * 2:
        for kind in opened.kinds(name):
            opened.read(name, kind)
    assert len(looks) == 2, "for the names, and for where each is"


def test_a_wrong_name_is_answered_with_the_right_one(written):
    opened = open_checkpoint(str(written.root))
    with pytest.raises(InvalidLayoutError, match=r"no parameter 'embed.wieght'.*'embed.weight'"):
        opened.read("embed.wieght", "fp32")
    with pytest.raises(InvalidLayoutError, match=r"no 'exp_avgs' of embed.weight.*'exp_avg'"):
        opened.read("embed.weight", "exp_avgs")
    with pytest.raises(InvalidLayoutError, match="no buffer of positions in scope 'rank-7'"):
        opened.read("positions", "buffer", scope="rank-7")
    with pytest.raises(InvalidLayoutError, match="no parameter 'job'"):
        opened.read("job", "blob")


def test_what_several_ranks_stored_needs_a_scope(checkpoint_factory, model_tensors):
    tensors = model_tensors()
    own = TensorKey("buffer", "positions", "rank-1")
    tensors[own] = ("int64", np.arange(37, dtype=np.int64) * 2)
    opened = open_checkpoint(str(checkpoint_factory(2, tensors=tensors).root))
    with pytest.raises(InvalidLayoutError, match="stored 2 times: pass scope= one of rank-0, rank"):
        opened.read("positions", "buffer")
    assert opened.read("positions", "buffer", scope="rank-1")[3] == 6


def test_checkpoints_are_listed_newest_first_and_the_newest_is_opened(
    checkpoint_factory, written, tmp_path
):
    later = checkpoint_factory(2, ticket=replace(written.ticket, world_size=2, step=20, tag="t20"))
    source = later.root / later.ticket.directory
    source.rename(written.root / later.ticket.directory)
    infos = list_checkpoints(str(written.root))
    assert [(info.tag, info.step) for info in infos] == [("t20", 20), ("global_step10", 10)]
    assert open_checkpoint(str(written.root)).step == 20
    with pytest.raises(ObjectNotFoundError):
        open_checkpoint(str(tmp_path / "nothing"))
    with pytest.raises(ObjectNotFoundError, match="t30"):
        open_checkpoint(str(written.root), "t30")
