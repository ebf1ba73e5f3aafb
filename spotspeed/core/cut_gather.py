"""Exchange of small values between all ranks over the control plane: everybody gets everybody's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from spotspeed.core.cut_actions import Action, Exchanged
from spotspeed.core.cut_messages import Gather, Gathered, Message

WITHDRAWN = "withdrawn"
"""The label with which a rank takes its offer back; no exchange is called so."""
REMEMBERED_RESULTS = 4
SLOWEST_RESEND_S = 5.0


@dataclass(slots=True)
class Offer:
    """One rank's side: its value, sent again, ever more slowly, until the result is there.

    `say` sends to the leader; what an exchange ends with goes to `actions`.
    """

    resend_s: float
    say: Callable[[Message], None]
    actions: list[Action]
    known_missing: tuple[int, ...] = ()
    _serial: int = 0
    _message: Gather | None = None
    _resend_at: float = 0.0
    _wait_s: float = 0.0

    def begin(self, label: str, value: bytes, now: float) -> int:
        """Offer `value`; the serial of this exchange.

        With the label WITHDRAWN the exchange that runs is given up, and `value` says why; it ends
        with that, unless all ranks had come before.
        """
        is_taken_back = label == WITHDRAWN
        if is_taken_back and self._message is None:
            return self._serial
        self._serial += not is_taken_back
        self._message = Gather(self._serial, label, value)
        self._wait_s, self._resend_at = self.resend_s, now + self.resend_s
        self.known_missing = ()
        self.say(self._message)
        return self._serial

    @property
    def serial(self) -> int | None:
        """Of the exchange that runs."""
        return None if self._message is None else self._message.serial

    def answered(self, message: Gathered) -> None:
        if self._message is None and message.serial == self._serial + 1:
            # The others have given up an exchange that this rank never joined: it is passed over.
            self._serial += 1
            self.actions.append(Exchanged(self._serial, None, ""))
        if message.serial != self.serial:
            return
        if message.missing:
            self.known_missing = message.missing
        else:
            self._end(None if message.why else message.values, message.why)

    def fail(self, why: str) -> None:
        if self._message is not None:
            self._end(None, why)

    def tick(self, now: float) -> None:
        if self._message is not None and now >= self._resend_at:
            self._wait_s = min(2 * self._wait_s, SLOWEST_RESEND_S)
            self._resend_at = now + self._wait_s
            self.say(self._message)

    def wake(self) -> float | None:
        return None if self._message is None else self._resend_at

    def _end(self, values: tuple[bytes, ...] | None, why: str) -> None:
        assert self._message is not None
        self.actions.append(Exchanged(self._message.serial, values, why))
        self._message = None


@dataclass(slots=True)
class Desk:
    """The leader's side: collects the values of one serial after the other."""

    members: tuple[int, ...]
    post: Callable[[int, Message], None]
    _offers: dict[int, dict[int, Gather]] = field(default_factory=dict)
    _results: dict[int, Gathered] = field(default_factory=dict)
    _newest: int = 0
    """The last exchange that has ended; those before it have, too."""

    def take(self, sender: int, message: Gather) -> None:
        """One rank's value; answers all when it was the last, or labels differ, or one gives up."""
        serial = message.serial
        if serial in self._results or serial <= self._newest:
            over = Gathered(serial, (), "the other ranks have ended it without this one", ())
            self.post(sender, self._results.get(serial, over))
            return
        offers = self._offers.setdefault(serial, {})
        is_repeated = sender in offers
        offers[sender] = message
        if message.label == WITHDRAWN:
            why = message.value.decode(errors="replace")
            self._finish(Gathered(serial, (), why, ()), everybody=True)
        elif len({offer.label for offer in offers.values()}) > 1:
            self._finish(Gathered(serial, (), _mismatch(offers), ()))
        elif len(offers) == len(self.members):
            values = tuple(offers[rank].value for rank in self.members)
            self._finish(Gathered(serial, values, "", ()))
        elif is_repeated:
            self.post(sender, Gathered(serial, (), "", self.missing(serial)))

    def missing(self, serial: int) -> tuple[int, ...]:
        """Ranks whose value has not come."""
        offers = self._offers.get(serial, {})
        return tuple(rank for rank in self.members if rank not in offers)

    def _finish(self, result: Gathered, *, everybody: bool = False) -> None:
        self._results[result.serial] = result
        self._newest = max(self._newest, result.serial)
        offers = self._offers.pop(result.serial)
        for rank in self.members if everybody else offers:
            self.post(rank, result)
        while len(self._results) > REMEMBERED_RESULTS:
            del self._results[min(self._results)]


def _mismatch(offers: dict[int, Gather]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, offer in sorted(offers.items()):
        ranks.setdefault(offer.label, []).append(rank)
    told = "; ".join(f"ranks {who[:8]} exchange '{label}'" for label, who in ranks.items())
    return f"the ranks are not at the same place of the program: {told}"
