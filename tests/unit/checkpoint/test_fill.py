"""Filling tensors through a bounded buffer reads the same bytes as filling them in place."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spotspeed.checkpoint.fill import batches, bounce
from spotspeed.checkpoint.reader import ReadReport
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, Holding, TensorKey
from spotspeed.state.piece import Piece


class Numbered:
    """A store in which element i of every tensor is the float32 number i."""

    def read_into(self, requests: Sequence[tuple[Fragment, memoryview]]) -> ReadReport:
        for fragment, buffer in requests:
            wanted = torch.arange(fragment.interval.start, fragment.interval.stop).float()
            buffer[:] = memoryview(wanted.view(torch.uint8).numpy())
        size = sum(len(buffer) for _, buffer in requests)
        return ReadReport(size, size, len(requests), 0)


def piece(name: str, start: int, stop: int) -> Piece:
    fragment = Fragment(TensorKey("fp32", name), "float32", (1000,), Interval(start, stop))
    return Piece(Holding(fragment), torch.zeros(stop - start))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=6),
    st.integers(4, 900),
)
def test_batches_cover_every_element_once_within_the_limit(
    ranges: list[tuple[int, int]], limit_bytes: int
) -> None:
    pieces = [piece(str(i), start, start + count) for i, (start, count) in enumerate(ranges)]
    for batch in batches(pieces, limit_bytes):
        assert 0 < sum(part.fragment.size_bytes for part in batch) <= limit_bytes
        bounce(batch, Numbered())
    for filled in pieces:
        interval = filled.fragment.interval
        assert filled.tensor.tolist() == list(range(interval.start, interval.stop))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_tensor_on_a_device_is_filled() -> None:
    from spotspeed.checkpoint.fill import fill

    target = piece("w", 10, 700)
    on_device = Piece(target.holding, target.tensor.cuda())
    assert fill([on_device], Numbered(), bounce_bytes=256) == 690 * 4
    assert on_device.tensor.cpu().tolist() == list(range(10, 700))
