"""What the cut machine asks its driver to do, and the times it works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spotspeed.core.cut_messages import Cut, Message, Term


@dataclass(frozen=True, slots=True)
class Timing:
    """Intervals of the protocol, in seconds."""

    resend_s: float = 0.2
    """What was not answered is sent again after so long."""
    poll_s: float = 3.0
    """How often ranks whose save takes its time are asked for news."""
    max_hold_s: float = 30.0
    """A save without a notice that holds a step for longer is abandoned on all ranks."""
    settle_s: float = 15.0
    """After a loss, survivors that cannot reach a common step in so long give up."""
    after_loss_s: float = 120.0
    """After a loss, survivors wait no longer than this for their last save to be sealed."""
    linger_s: float = 1.0
    """How long a closing leader waits for the last acknowledgements."""
    stuck_s: float = 0.5
    """After a loss, a survivor that is still inside an update, or before it, so long after all know
    the step, waits in a collective for the lost rank: the step is given up."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` to rank `to`, in order with everything else sent to it."""

    to: int
    term: Term
    message: Message


@dataclass(frozen=True, slots=True)
class Decided:
    """This rank knows the step of the round."""

    cut: Cut


@dataclass(frozen=True, slots=True)
class Capture:
    """The state is that of `cut.step` and stays so until it is reported staged: copy it."""

    cut: Cut


@dataclass(frozen=True, slots=True)
class Settled:
    """The round is over: sealed under `digest`, or (None) not known durable for the reason `why`.

    Tell whoever captures, and call `CutMachine.delivered` after that: only then may the training
    change a state that was still being copied.
    """

    cut: Cut
    digest: str | None
    why: str


@dataclass(frozen=True, slots=True)
class Departed:
    """Everybody knows the outcome of the stopping round; this process is to leave."""

    round: int
    digest: str | None
    why: str


@dataclass(frozen=True, slots=True)
class PeerLost:
    """A rank is gone. The job is over; the survivors save what they can and leave."""

    rank: int
    why: str


@dataclass(frozen=True, slots=True)
class AllClosed:
    """Every rank has closed; nothing more will be said."""


@dataclass(frozen=True, slots=True)
class Exchanged:
    """The exchange of that serial is over: values by rank, or None and the reason.

    Without a reason: given up by the others before this rank joined it, and so no concern of it.
    """

    serial: int
    values: tuple[bytes, ...] | None
    why: str

    @property
    def is_passed_over(self) -> bool:
        """Whether this rank has never joined it."""
        return self.values is None and not self.why

    def join(self, ended: Mapping[int, Exchanged]) -> dict[int, Exchanged]:
        """What a rank that is in no more than one exchange still has to know of those that ended.

        The others were asked for by a call that is over, but for those it has to pass over yet.
        """
        passed = {serial: each for serial, each in ended.items() if each.is_passed_over}
        return passed | {self.serial: self}


Action = Send | Decided | Capture | Settled | Departed | PeerLost | AllClosed | Exchanged
