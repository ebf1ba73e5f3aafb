"""What an interruption notice leaves time for: durable, on the node only, staged only, or nothing.

Two clocks run. The ranks live until the launcher, the pod or the cloud takes them: by then the
state must be staged. The saver lives until the machine or the pod is gone: by then the checkpoint
must be written and sealed. Staging and writing overlap, so a durable save takes the longer of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

NOTICES_S = (120.0, 30.0, 15.0)
"""Notices of EC2, of Azure and of launchers, and of GKE pods."""
CAUTION = 0.1
"""Part of the time that has to be left over before the node's own disk is passed by."""
COMPRESSED = 0.95
"""Stored bytes per raw byte below which the data is worth compressing."""


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

    def after_notice(self, *, agreement_s: float, step_s: float, poll_s: float) -> Measured:
        """The same, seen from the moment of the notice instead of that of the capture."""
        return replace(self, agreement_s=agreement_s, step_s=step_s, poll_s=poll_s)

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


@dataclass(frozen=True, slots=True)
class Orders:
    """How a save is to be stored: `compression` "zstd", "none" or "" for the saver's choice.

    `is_direct` leads it past the node's own disk.
    """

    compression: str = ""
    is_direct: bool = False


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a place was seen to take this rank's shards, and what the encoding did to them.

    `write_bytes_s` counts stored bytes, `encode_bytes_s` raw ones (None: nothing was encoded), and
    `ratio` is stored bytes per raw byte.
    """

    write_bytes_s: float
    encode_bytes_s: float | None = None
    ratio: float = 1.0

    @staticmethod
    def of(raw_bytes: int, stored_bytes: int, encode_s: float, write_s: float) -> Pace | None:
        """The pace of one save; None where there is nothing to tell it by."""
        if raw_bytes <= 0 or stored_bytes <= 0 or write_s <= 0:
            return None
        encode_bytes_s = raw_bytes / encode_s if encode_s > 0 else None
        return Pace(stored_bytes / write_s, encode_bytes_s, stored_bytes / raw_bytes)


@dataclass(frozen=True, slots=True)
class Way:
    """One way of storing a save."""

    sink: Sink
    orders: Orders


@dataclass(frozen=True, slots=True)
class Places:
    """Where this rank's saves go: the store and, with `local_path`, the node's own disk.

    `compression` is the config's, "" where it leaves the choice.
    """

    url: str
    remote: Pace
    seal_s: float
    near: Pace | None = None
    compression: str = ""

    def ways(self) -> tuple[tuple[Way, ...], tuple[Way, ...], tuple[Way, ...]]:
        """(as always, past the node's disk, on the node only); each with and without compression.

        Through the node's disk a shard is written twice, one after the other.
        """
        near, remote = self.near, self.remote
        if near is None:
            return self._both(self.url, remote.write_bytes_s), (), ()
        twice = 1 / (1 / near.write_bytes_s + 1 / remote.write_bytes_s)
        return (
            self._both(f"{self.url} by way of the node", twice),
            self._both(self.url, remote.write_bytes_s, is_direct=True),
            self._both("the node's disk", near.write_bytes_s, is_near=True),
        )

    def _both(
        self, name: str, write_bytes_s: float, *, is_direct: bool = False, is_near: bool = False
    ) -> tuple[Way, ...]:
        encoded = self.near if self.near is not None else self.remote
        seal_s = 0.0 if is_near else self.seal_s
        as_seen = Sink(name, write_bytes_s, seal_s, not is_near, encoded.ratio,
                       encoded.encode_bytes_s)  # fmt: skip
        found = [Way(as_seen, Orders(self.compression, is_direct))]
        if not self.compression and encoded.ratio < COMPRESSED:
            raw = Sink(f"{name}, not compressed", write_bytes_s, seal_s, not is_near)
            found.append(Way(raw, Orders("none", is_direct)))
        return tuple(found)


def choose(limits: Limits, measured: Measured, places: Places) -> tuple[Decision, Orders]:
    """What to do, and how to store it: as always, if that fits.

    With too little time for both the node's disk and the store, the store alone where that fits
    with something to spare, and else the node's disk alone.
    """
    always, direct, near = places.ways()
    decision = _decide_among(limits, measured, always)
    if decision.action is not Action.SAVE and direct:
        daring = _decide_among(limits, measured, direct)
        is_fit = daring.action is Action.SAVE
        if is_fit and daring.spare_s >= CAUTION * limits.machine_s:
            decision = daring
        else:
            # What stays here is drained some day: larger only where that is what makes it fit.
            as_seen = _decide_among(limits, measured, near[:1])
            fits = as_seen.action is Action.SAVE_NODE
            decision = as_seen if fits else _decide_among(limits, measured, [*always, *near])
    ways = {way.sink: way.orders for way in (*always, *direct, *near)}
    if decision.sink is not None:
        return decision, ways[decision.sink]
    fastest = min(always, key=lambda way: _done_s(measured, way.sink))
    return decision, fastest.orders


def _decide_among(limits: Limits, measured: Measured, ways: Sequence[Way]) -> Decision:
    return decide(limits, measured, [way.sink for way in ways])


def patience_s(decision: Decision, limits: Limits, *, at_most_s: float) -> float:
    """How long a save may wait for the end of a training step before it is staged."""
    if decision.sink is None:
        return 0.0
    return max(0.0, min(at_most_s, decision.spare_s, limits.ranks_s - decision.staged_s))


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


def largest_durable_bytes(limits: Limits, measured: Measured, places: Places) -> int:
    """Bytes of one rank or node that such a notice makes durable at the store, at most."""
    always, direct, _ = places.ways()
    return max(largest_state_bytes(limits, measured, way.sink) for way in (*always, *direct))


def _done_s(measured: Measured, sink: Sink) -> float:
    staging_s = measured.state_bytes / measured.stage_bytes_s
    return measured.begin_s + max(staging_s, sink.write_s(measured.state_bytes)) + sink.seal_s


def _or_inf(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds
