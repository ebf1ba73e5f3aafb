"""Large tensors of a caller's data come back as they were, wherever they lay in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spotspeed.checkpoint.named import decode_client_state, encode_client_state
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.core.plain import Tagged, decode
from spotspeed.errors import CaptureError, FormatError
from spotspeed.state.set_aside import LARGE_BYTES, put_back, set_aside
from tests.unit.checkpoint.conftest import write_checkpoint

COUNT = LARGE_BYTES // 4


def large() -> torch.Tensor:
    return torch.arange(COUNT, dtype=torch.float32)


@pytest.fixture
def round_trip(tmp_path: Any) -> Callable[[Any], dict[str, Any]]:
    """Client state through a checkpoint of three ranks, whatever they hold of each tensor."""

    def pass_through(value: Any) -> dict[str, Any]:
        client = encode_client_state(value)
        assert len(client.data) < LARGE_BYTES
        held = {
            fragment.key: (fragment.dtype, flat.view(torch.uint8).numpy().view(kind_of(fragment))
                           .reshape(fragment.shape))
            for fragment, flat in client.tensors
        }  # fmt: skip
        written = write_checkpoint(tmp_path / "run", held, 3, chunk_bytes=1 << 16)
        reader = CheckpointReader(written.storage, written.manifest)
        return decode_client_state(client.job()["client_state"], reader)

    return pass_through


def kind_of(fragment: Any) -> str:
    return "u2" if fragment.dtype == "bfloat16" else fragment.dtype


def test_large_tensors_and_arrays_come_back_in_their_places(round_trip) -> None:
    value = {
        "ema": {"w": large().reshape(512, -1).t(), "b": [large().to(torch.bfloat16).repeat(2)]},
        "array": (np.asfortranarray(np.arange(COUNT, dtype=np.int64).reshape(64, -1)), "x"),
        "parameter": torch.nn.Parameter(large(), requires_grad=False),
        "small": torch.ones(3), 7: np.zeros(2), "object": SimpleNamespace(best=deque([large()])),
    }  # fmt: skip
    found = round_trip(value)
    assert list(found) == list(value)
    assert torch.equal(found["ema"]["w"], value["ema"]["w"])
    assert torch.equal(found["ema"]["b"][0], value["ema"]["b"][0])
    assert found["array"][0].dtype == np.int64 and found["array"][1] == "x"
    assert np.array_equal(found["array"][0], value["array"][0])
    assert type(found["parameter"]) is torch.nn.Parameter
    assert not found["parameter"].requires_grad and torch.equal(found["parameter"], large())
    assert found["small"].tolist() == [1, 1, 1] and found[7].tolist() == [0, 0]
    assert torch.equal(found["object"].best[0], large())
    found["ema"]["w"] += 1
    found["array"][0][0] = 1


def test_what_was_given_is_copied_and_what_is_there_twice_is_stored_once() -> None:
    tensor, array = large(), np.ones(COUNT, np.float32)
    client = encode_client_state({"a": tensor, "b": [tensor], "c": array})
    tensor.zero_()
    array[:] = 0
    assert len(client.tensors) == 2
    assert torch.equal(client.tensors[0][1], large())
    assert client.tensors[1][1].sum() == COUNT


def test_an_array_of_another_kind_stays_where_it_is() -> None:
    for array in (np.zeros(COUNT, ">f4"), np.zeros(COUNT, "M8[s]"), np.zeros(COUNT, "U1")):
        value, pieces = set_aside({"a": array})
        assert value["a"] is array and pieces == ()


def test_a_large_tensor_that_cannot_be_stored_is_named_by_its_key() -> None:
    with pytest.raises(CaptureError, match=r"^client_state\['a'\]\[0\]: a tensor on the meta"):
        encode_client_state({"a": [torch.empty(COUNT, device="meta")]})


@pytest.mark.parametrize("value", [3, ("0",), (0, True), ("0", 1), None], ids=str)
def test_a_place_that_names_no_tensor_is_refused(value: Any) -> None:
    with pytest.raises(FormatError, match="does not name a stored tensor"):
        put_back([Tagged("stored", value)], lambda _: torch.zeros(1))


def test_a_tensor_that_is_not_in_the_checkpoint_is_damage(tmp_path: Any) -> None:
    written = write_checkpoint(tmp_path, {}, 1)
    reader = CheckpointReader(written.storage, written.manifest)
    stored = decode(encode_client_state({"a": large()}).data, source="test")
    with pytest.raises(FormatError, match=r"client_state: client.* is not in the checkpoint"):
        decode_client_state(stored["a"], reader)
