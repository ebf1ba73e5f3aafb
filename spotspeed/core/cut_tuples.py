"""Actions of the native cut machine, which hands them over as plain tuples, with their types back.

An action is (name, field, ...); a Send is ("Send", to, bytes of the wire). csrc/bindings_cut.cpp
makes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spotspeed.core.cut_actions import (
    Action,
    AllClosed,
    Capture,
    Decided,
    Departed,
    Exchanged,
    PeerLost,
    Send,
    Settled,
    Timing,
)
from spotspeed.core.cut_messages import Cut, decode

_PLAIN: dict[str, Any] = {
    "Departed": Departed,
    "PeerLost": PeerLost,
    "AllClosed": AllClosed,
    "Exchanged": Exchanged,
}
_OF_CUT: dict[str, Any] = {"Decided": Decided, "Capture": Capture, "Settled": Settled}


def actions_of(raw: Iterable[tuple[Any, ...]]) -> list[Action]:
    """The actions that `raw` stands for, in order."""
    return [_action_of(*each) for each in raw]


def _action_of(name: str, *fields: Any) -> Action:
    if name == "Send":
        to, data = fields
        return Send(to, *decode(data, source="this rank's own machine"))
    if name in _OF_CUT:
        action: Action = _OF_CUT[name](Cut(*fields[0]), *fields[1:])
        return action
    plain: Action = _PLAIN[name](*fields)
    return plain


def timing_tuple(timing: Timing) -> tuple[float, float, float, float, float, float, float]:
    """The intervals in the order in which the native machine takes them."""
    return (
        timing.resend_s, timing.poll_s, timing.max_hold_s, timing.settle_s, timing.after_loss_s,
        timing.linger_s, timing.stuck_s,
    )  # fmt: skip
