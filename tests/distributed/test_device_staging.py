"""State on an accelerator reaches the saver by the engine's plan, into memory that was locked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.config import parse_block
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket
from spotspeed.staging.devices import Copies, NativeQueue, Pending
from spotspeed.staging.native import DeviceError, TwinCopyEngine
from spotspeed.staging.stager import Stager, Terms
from spotspeed.storage.local import LocalStorage

WAIT_S = 60.0
ACCELERATOR = torch.device("cpu")
"""Whose memory the engine's twin can read."""


class Event:
    """What a boundary records on a device, as torch.cuda.Event shows it."""

    cuda_event = 4711


class TwinEngines:
    """The accelerator of a machine without one: its memory is the host's, its engine the twin."""

    def __init__(self, *, refuses_lock: bool = False) -> None:
        self.twin = TwinCopyEngine()
        self.refuses_lock = refuses_lock
        self.log: list[tuple[Any, ...]] = []

    def queue(self, device: torch.device, after: Any) -> TwinQueue:
        return TwinQueue(self, after)

    def lock(self, device: torch.device, address: int, size_bytes: int) -> object:
        self.log.append(("lock", device, address, size_bytes))
        if self.refuses_lock:
            raise DeviceError("cudaHostRegister: operation not permitted")
        return object()

    def submit(self, copies: Copies, *, after_event: int = 0, keep: object = None) -> Any:
        self.log.append(("copies", len(copies), after_event, int(copies[:, 1].min())))
        return self.twin.submit(copies, after_event=after_event, keep=keep)


class TwinQueue:
    """The product's queue, over the twin."""

    def __init__(self, engines: TwinEngines, after: Any) -> None:
        self._inner = NativeQueue(engines, after)

    def submit(self, copies: Copies, tensors: Sequence[torch.Tensor]) -> Pending:
        return self._inner.submit(copies, tensors)


def pieces_of(small: int) -> list[tuple[Fragment, torch.Tensor]]:
    """Many small tensors, scalars, and one that is larger than a chunk."""
    torch.manual_seed(3)
    tensors = [torch.randn(100 + number % 3) for number in range(small)]
    tensors += [torch.randn(1) for _ in range(small)] + [torch.randn(1_000_000)]
    return [
        (Fragment(TensorKey("exp_avg", f"w{number}"), "float32", (len(tensor),),
                  Interval(0, len(tensor))), tensor)
        for number, tensor in enumerate(tensors)
    ]  # fmt: skip


def save(path: Path, engines: TwinEngines, *, times: int = 2) -> None:
    """Reserve, save, and read back; a later save reads the addresses and values of its time."""
    pieces = pieces_of(2_000)
    stager = Stager(str(path), parse_block({"path": str(path)}), 0, engines=engines)
    stager.reserve(sum(fragment.size_bytes for fragment, _ in pieces), ACCELERATOR)
    for step in range(1, times + 1):
        pieces = [(fragment, tensor + step) for fragment, tensor in pieces]
        ticket = Ticket(1, step, "a", f"step-{step}", "periodic", 1, 0)
        blobs = {TensorKey("blob", "rank", "rank-0"): bytes(100 + step)}
        saving = stager.stage(ticket, pieces, blobs, terms=Terms(after=Event()))
        assert saving.wait_staged(WAIT_S)
        manifest = saving.upload_completion.result(WAIT_S)
        reader = CheckpointReader(LocalStorage(path), manifest)
        found = [(fragment, bytearray(fragment.size_bytes)) for fragment, _ in pieces]
        reader.read_into(found)
        for (fragment, tensor), (_, data) in zip(pieces, found, strict=True):
            assert np.array_equal(np.frombuffer(data, np.float32), tensor.numpy()), fragment.key
    stager.close()


def test_a_save_from_a_device_goes_into_memory_that_was_locked_at_attach(tmp_path: Path) -> None:
    engines = TwinEngines()
    save(tmp_path, engines)
    (kind, device, address, size), *rest = engines.log
    assert (kind, device) == ("lock", ACCELERATOR), "reserve() comes before the first copy"
    assert all(name == "copies" for name, *_ in rest), "locked once"
    assert {event for _, _, event, _ in rest} == {Event.cuda_event}
    into_arena = [count for _, count, _, target in rest if address <= target < address + size]
    assert sum(into_arena) >= 2 * 4_001
    assert len(into_arena) <= 4, "thousands of tensors go down in a call or two of each save"


def test_a_system_that_refuses_to_lock_memory_still_saves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engines = TwinEngines(refuses_lock=True)
    with caplog.at_level(logging.WARNING, logger="spotspeed"):
        save(tmp_path, engines)
    assert [name for name, *_ in engines.log].count("lock") == 1
    assert [record.getMessage() for record in caplog.records if "page-locked" in record.message]


def test_a_device_that_only_the_first_save_shows_is_locked_for_then(tmp_path: Path) -> None:
    engines = TwinEngines()
    pieces = pieces_of(10)
    stager = Stager(str(tmp_path), parse_block({"path": str(tmp_path)}), 0, engines=engines)
    stager.reserve(1 << 20)
    assert engines.log == []
    ticket = Ticket(1, 1, "a", "step-1", "periodic", 1, 0)
    assert stager.stage(ticket, pieces, {}).wait_staged(WAIT_S)
    stager.close()
    assert [name for name, *_ in engines.log].count("lock") == 1
