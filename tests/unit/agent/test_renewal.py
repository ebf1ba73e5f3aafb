"""The owner record lives as long as the rank does, and tells when only its saver is left."""

from __future__ import annotations

import time
from pathlib import Path

from spotspeed.agent.renewal import Renewal
from spotspeed.checkpoint.ownership import claim_epoch, read_owner, release
from spotspeed.storage.local import LocalStorage

PERIOD_S = 0.01
LIMIT_S = 30.0


def _wait_counter(storage: LocalStorage, counter: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while (owner := read_owner(storage)) is None or owner.counter < counter:
        assert time.monotonic() < deadline
        time.sleep(PERIOD_S)


def test_the_record_counts_up_until_it_is_stopped(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    epoch = claim_epoch(storage, period_s=PERIOD_S).epoch
    renewal = Renewal(storage, epoch, PERIOD_S)
    _wait_counter(storage, 3)
    renewal.stop()
    last = read_owner(storage)
    assert last is not None and last.state == "training"


def test_a_saver_that_is_left_alone_says_so_at_once(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    epoch = claim_epoch(storage).epoch
    renewal = Renewal(storage, epoch, period_s=1000.0)
    renewal.drain()
    renewal.stop()
    owner = read_owner(storage)
    assert owner is not None and owner.state == "draining"


def test_a_released_path_is_not_claimed_again_by_a_late_renewal(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    epoch = claim_epoch(storage).epoch
    renewal = Renewal(storage, epoch, period_s=1000.0)
    release(storage, epoch)
    renewal.drain()
    renewal.stop()
    owner = read_owner(storage)
    assert owner is not None and owner.state == "released"


def test_a_later_epoch_ends_the_renewal(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    first = claim_epoch(storage).epoch
    renewal = Renewal(storage, first, period_s=1000.0)
    second = claim_epoch(storage, take_over=True).epoch
    renewal.drain()
    renewal.stop()
    owner = read_owner(storage)
    assert owner is not None
    assert (owner.epoch, owner.state) == (second, "training")
