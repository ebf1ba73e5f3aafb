"""Huge pages are asked for where there is something to gain, and change no contents."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from spotspeed.state.huge_pages import LEAST_BYTES, ask

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_nothing_is_asked_for_a_small_tensor():
    assert not ask(torch.zeros(LEAST_BYTES // 4 - 1))


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not SETTING.exists(), reason="a kernel without them"
)
@pytest.mark.parametrize("offset", [0, 1])
def test_the_contents_of_a_large_tensor_stay_as_they_are(offset):
    whole = torch.arange(2 * LEAST_BYTES // 4, dtype=torch.int32)
    assert ask(whole[offset:])
    assert torch.equal(whole, torch.arange(2 * LEAST_BYTES // 4, dtype=torch.int32))
