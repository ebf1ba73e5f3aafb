"""What MPI still writes into outlives the call that gave it up."""

from __future__ import annotations

import gc
import time
import weakref

import pytest

from spotspeed.coordinator import mpi_world
from spotspeed.coordinator.mpi_world import await_mpi
from spotspeed.errors import CoordinationError


class Lonely:
    """A collective to which another rank never comes."""

    def Test(self) -> bool:
        return False


class Communicator:
    """What MPI makes of the last rank's word."""


def test_a_collective_that_is_given_up_keeps_what_mpi_writes_into(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mpi_world, "_unfinished", [])
    request, result = Lonely(), Communicator()
    kept = [weakref.ref(request), weakref.ref(result)]
    with pytest.raises(CoordinationError, match="every rank must attach"):
        await_mpi(request, time.monotonic() - 1.0, 1.0, result=result)
    del request, result
    gc.collect()
    assert all(reference() is not None for reference in kept)
