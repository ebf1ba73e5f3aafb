"""One word of rank 0 to all ranks before there is an agreement: through the job's store."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta

from spotspeed.coordinator.rendezvous import default_store, second_client
from spotspeed.errors import CoordinationError, SpotSpeedError

_SAID, _REFUSED = b"+", b"-"
_serials = itertools.count()


def word_of_rank_zero(label: str, decide: Callable[[], bytes], *, timeout_s: float) -> bytes:
    """What `decide` returned on rank 0, on every rank; every rank calls it, in equal order.

    A process that belongs to no group decides alone. Raises rank 0's error there and
    CoordinationError with its text elsewhere; CoordinationError when nothing comes in time.
    """
    store = default_store()
    rank = _rank()
    if store is None or rank is None:
        return decide()
    client, key = second_client(store), f"spotspeed/{label}/{next(_serials)}"
    if rank == 0:
        try:
            word = decide()
        except SpotSpeedError as error:
            client.set(key, _REFUSED + str(error).encode())
            raise
        client.set(key, _SAID + word)
        return word
    try:
        client.wait([key], timedelta(seconds=timeout_s))
    except (RuntimeError, OSError) as error:
        raise CoordinationError(
            f"{label}: rank 0 has said nothing within {timeout_s:g} s: {error}"
        ) from error
    said = bytes(client.get(key))
    if said[:1] == _REFUSED:
        raise CoordinationError(f"rank 0: {said[1:].decode(errors='replace')}")
    return said[1:]


def _rank() -> int | None:
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return None
    return int(distributed.get_rank())
