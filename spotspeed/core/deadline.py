"""What an interruption notice leaves time for: durable, on the node only, staged only, or nothing.

Two clocks run. The ranks live until the launcher, the pod or the cloud takes them: by then the
state must be staged. The saver lives until the machine or the pod is gone: by then the checkpoint
must be written and sealed. Staging and writing overlap, so a durable save takes the longer of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Action(Enum):
    """What is worth doing, best first."""

    SAVE = "save"
    """Durable at a store that survives the machine."""
    SAVE_NODE = "save on the node"
    """Durable on a disk that survives the ranks, and the machine only where it comes back."""
    STAGE = "stage"
    """In the saver's memory only: survives the ranks; of use when the machine stays after all."""
    NOTHING = "nothing newer"


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds from the notice until somebody acts; None when nobody of the kind does.

    `cloud_s` takes the machine, `pod_s` the container with all its processes, `launcher_s` the
    ranks alone.
    """

    cloud_s: float | None = None
    launcher_s: float | None = None
    pod_s: float | None = None

    @property
    def machine_s(self) -> float:
        """How long the saver lives."""
        return min(_or_inf(self.cloud_s), _or_inf(self.pod_s))

    @property
    def ranks_s(self) -> float:
        """How long the ranks live."""
        return min(self.machine_s, _or_inf(self.launcher_s))


@dataclass(frozen=True, slots=True)
class Sink:
    """Where a checkpoint can go: measured bytes per second of one node, and seconds to seal.

    `ratio` is stored bytes per raw byte, below 1 with compression, whose raw speed is
    `encode_bytes_s`.
    """

    name: str
    write_bytes_s: float
    seal_s: float
    survives_machine: bool
    ratio: float = 1.0
    encode_bytes_s: float | None = None

    def write_s(self, state_bytes: int) -> float:
        """Seconds to encode and write; the two overlap."""
        encode_s = state_bytes / self.encode_bytes_s if self.encode_bytes_s else 0.0
        return max(state_bytes * self.ratio / self.write_bytes_s, encode_s)


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on this node: `state_bytes` are its share of a checkpoint.

    `agreement_s` from the notice until all ranks know the step, `step_s` the longest step that the
    cut may have to wait for, `poll_s` how late the notice may be heard.
    """

    state_bytes: int
    stage_bytes_s: float
    agreement_s: float = 0.1
    step_s: float = 0.0
    poll_s: float = 0.0

    @property
    def staged_s(self) -> float:
        """Seconds from the notice until the state is out of the ranks' memory."""
        return self.begin_s + self.state_bytes / self.stage_bytes_s

    @property
    def begin_s(self) -> float:
        """Seconds from the notice until the first byte is staged."""
        return self.poll_s + self.agreement_s + self.step_s


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, where, when it will be done, and why; `spare_s` is negative when it fails."""

    action: Action
    sink: Sink | None
    staged_s: float
    done_s: float
    spare_s: float
    reason: str


def decide(limits: Limits, measured: Measured, sinks: Sequence[Sink]) -> Decision:
    """The best that fits: sinks that survive the machine first, the fastest of them.

    Raises nothing: with no time for anything the decision is NOTHING, with the numbers of what
    comes closest.
    """
    staged_s, ranks_s, machine_s = measured.staged_s, limits.ranks_s, limits.machine_s
    if staged_s > ranks_s:
        return Decision(
            Action.NOTHING, None, staged_s, math.inf, ranks_s - staged_s,
            f"staging takes until {staged_s:.1f} s and the ranks live for {ranks_s:.1f} s",
        )  # fmt: skip
    ordered = sorted(sinks, key=lambda sink: (not sink.survives_machine, _done_s(measured, sink)))
    nearest = math.inf
    for sink in ordered:
        done_s = _done_s(measured, sink)
        if done_s <= machine_s:
            action = Action.SAVE if sink.survives_machine else Action.SAVE_NODE
            return Decision(
                action, sink, staged_s, done_s, machine_s - done_s,
                f"{sink.name} is durable at {done_s:.1f} s of {machine_s:.1f} s",
            )  # fmt: skip
        nearest = min(nearest, done_s)
    return Decision(
        Action.STAGE, None, staged_s, nearest, machine_s - nearest,
        f"the fastest store is durable at {nearest:.1f} s and the machine is gone at "
        f"{machine_s:.1f} s",
    )  # fmt: skip


def largest_state_bytes(limits: Limits, measured: Measured, sink: Sink) -> int:
    """Bytes of one node that a notice with these limits makes durable at `sink`."""
    writing_s = limits.machine_s - measured.begin_s - sink.seal_s
    staging_s = min(limits.ranks_s - measured.begin_s, writing_s)
    if staging_s <= 0 or writing_s <= 0:
        return 0
    rate = sink.write_bytes_s / sink.ratio
    if sink.encode_bytes_s is not None:
        rate = min(rate, sink.encode_bytes_s)
    return int(min(staging_s * measured.stage_bytes_s, writing_s * rate))


def _done_s(measured: Measured, sink: Sink) -> float:
    staging_s = measured.state_bytes / measured.stage_bytes_s
    return measured.begin_s + max(staging_s, sink.write_s(measured.state_bytes)) + sink.seal_s


def _or_inf(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds
