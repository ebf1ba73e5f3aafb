"""Which control thread a rank gets: the native one wherever its transport is native."""

from __future__ import annotations

import time
from dataclasses import dataclass

from spotspeed.coordinator.control import Control, ControlThread
from spotspeed.coordinator.listener import CutListener, Source
from spotspeed.coordinator.native_transport import HAS_NATIVE, NativeTransport
from spotspeed.coordinator.transport import Transport
from spotspeed.core.cut import CutMachine
from spotspeed.core.cut_actions import Timing


@dataclass(frozen=True, slots=True)
class Ending:
    """How long the main thread may take to the gate, and the exit code of a durable stop."""

    grace_s: float
    durable_code: int


def start_control(
    transport: Transport, listener: CutListener, source: Source, timing: Timing, ending: Ending
) -> ControlThread:
    """The running control thread of this rank, which owns `transport` from now on."""
    if HAS_NATIVE and isinstance(transport, NativeTransport):
        from spotspeed.coordinator.native_control import NativeControl

        return NativeControl(
            transport, listener, source, timing,
            grace_s=ending.grace_s, durable_code=ending.durable_code,
        )  # fmt: skip
    now = time.monotonic()
    machine = CutMachine(
        transport.rank, transport.world_size, now=now, timing=timing,
        unix_offset_s=time.time() - now,
    )  # fmt: skip
    return Control(transport, machine, listener, source=source, grace_s=ending.grace_s)
