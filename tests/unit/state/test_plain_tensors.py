"""Torch's values survive the way through plain data bit for bit."""

from __future__ import annotations

from collections import Counter, OrderedDict

import pytest
import torch

from spotspeed.core.layout import ITEM_BYTES
from spotspeed.core.plain import ArrayData, Tagged, decode, encode
from spotspeed.errors import CaptureError, FormatError
from spotspeed.state.plain_tensors import TORCH_DTYPES, from_plain, to_plain


def round_trip(value):
    return from_plain(decode(encode(to_plain(value), what="value"), source="test"))


def test_this_torch_has_every_dtype_of_the_format():
    assert set(TORCH_DTYPES) == set(ITEM_BYTES)


@pytest.mark.parametrize("name", sorted(ITEM_BYTES))
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_of_every_dtype_come_back_bit_for_bit(name, shape):
    count = torch.Size(shape).numel()
    bits = torch.randint(0, 2 if name == "bool" else 256, (count * ITEM_BYTES[name],))
    tensor = bits.to(torch.uint8).view(TORCH_DTYPES[name]).reshape(shape)
    found = round_trip(tensor)
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    if count:
        assert torch.equal(found.reshape(-1).view(torch.uint8), bits.to(torch.uint8))


def test_views_of_any_layout_come_back_with_their_values():
    base = torch.arange(24.0).reshape(2, 3, 4)
    for view in (base.transpose(0, 2), base[:, 1], base[0, 0].expand(5, 4), base[..., ::2]):
        assert torch.equal(round_trip(view), view)
    conjugate = torch.randn(3, dtype=torch.complex64).conj()
    assert torch.equal(round_trip(conjugate), conjugate)
    assert torch.equal(round_trip(conjugate.imag), conjugate.imag)


def test_types_of_torch_and_containers_are_kept():
    value = {
        "size": torch.Size([2, 3]), "dtype": torch.bfloat16, "device": torch.device("cuda", 1),
        "milestones": Counter({30: 1}), ("a", 1): OrderedDict(x=torch.tensor(2)),
        "set": {torch.float32}, "list": [(torch.tensor([True]),)],
    }  # fmt: skip
    found = round_trip(value)
    assert type(found["size"]) is torch.Size and found["size"] == (2, 3)
    assert found["dtype"] is torch.bfloat16
    assert found["device"] == torch.device("cuda:1")
    assert type(found["milestones"]) is Counter and found["milestones"][30] == 1
    assert type(found["a", 1]) is OrderedDict
    assert found["set"] == {torch.float32}
    assert found["list"][0][0].item() is True


def test_a_parameter_stays_a_parameter():
    found = round_trip(torch.nn.Parameter(torch.ones(2), requires_grad=False))
    assert type(found) is torch.nn.Parameter and not found.requires_grad


def test_a_restored_tensor_can_be_changed():
    found = round_trip(torch.zeros(3))
    found += 1
    assert found.tolist() == [1, 1, 1]


class Special(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensor,said",
    [(torch.eye(2).to_sparse(), "layout torch.sparse_coo .*to_dense"),
     (torch.empty(2, device="meta"), "meta device"),
     (torch.ones(1).as_subclass(Special), r"type .*\.Special .*as_subclass"),
     (torch.nn.Parameter(torch.empty(2, device="meta")), "meta device")],
    ids=["sparse", "meta", "subclass", "parameter"],
)  # fmt: skip
def test_a_tensor_without_plain_bytes_is_refused_by_its_key(tensor, said):
    with pytest.raises(CaptureError, match=rf"^state\['a'\]\[1\]: a.*{said}"):
        encode(to_plain({"a": [1, tensor]}), what="state")


@pytest.mark.parametrize(
    "value",
    [Tagged("os.system", "true"), Tagged("torch.dtype", "load"), Tagged("torch.Size", ("a",)),
     Tagged("torch.device", "/etc"), Tagged("torch.nn.Parameter", (True, 1)),
     Tagged("torch.nn.Parameter", 3)],
    ids=str,
)  # fmt: skip
def test_unknown_tags_are_refused(value):
    with pytest.raises(FormatError):
        from_plain([value])


def test_a_cycle_ends_in_the_error_that_names_it():
    cycle = []
    cycle.extend([cycle, cycle])
    with pytest.raises(CaptureError):
        encode(to_plain(cycle), what="value")
    assert isinstance(to_plain(torch.tensor(1)), ArrayData)
