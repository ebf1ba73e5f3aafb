"""The content of frozen weights is the same on a device and in host memory."""

from __future__ import annotations

import pytest
import torch

from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.staging.frozen import plan_share

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_same_bytes_have_the_same_content_wherever_they_are() -> None:
    torch.manual_seed(0)
    host = [torch.randn(count).bfloat16() for count in (20_000_001, 64, 3_000_000)]
    pieces = [
        (Fragment(TensorKey("weight", f"w{n}"), "bfloat16", (len(tensor),),
                  Interval(0, len(tensor))), tensor)
        for n, tensor in enumerate(host)
    ]  # fmt: skip
    contents = [
        [group.content for group in plan_share(
            [(fragment, tensor.to(device)) for fragment, tensor in pieces], {}
        ).new]
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    assert contents[0] and contents[0] == contents[1]
