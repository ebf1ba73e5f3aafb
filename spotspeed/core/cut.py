"""The cut: how all ranks agree on one step, save it, and leave together. One machine per rank.

Pure: messages and local events in, actions out, time as an argument. The ranks of a step are
coupled by its collectives, so nobody may stop early. The rule (docs/adr/0004-cut-rule.md):

1. A wish (save, stop) goes to the leader, the lowest living rank, again and again until heard.
2. PREPARE: every rank locks its gate, between two instructions of its training, and answers with
   the newest update it has begun. Nothing waits for a main thread.
3. DECIDE: the step is the largest answer. Ranks below it are let through up to it. After a stop
   nobody begins a later update; after a save only until the own state at the step is staged.
4. A rank that rests at the step is captured at once, whatever its main thread is doing.
5. When all parts are durable, or one is not, the leader tells the OUTCOME. When all know the
   outcome of a stop, all LEAVE.
6. A lost rank ends the job. The lowest survivor begins a new term, in which words of older terms
   count for nothing, keeps an outcome that somebody knows, goes on with a stop that was decided
   where the survivors stand, or else stops at the newest step that a survivor has begun.
7. Ranks that have closed stay in the protocol until all have.

`round` numbers the agreements, `Term` the leaderships. Steps are positions that only grow; the
coordinator maps them to optimizer steps.
"""

from __future__ import annotations

from enum import Enum, auto

from spotspeed.core.cut_actions import (
    Action,
    AllClosed,
    PeerLost,
    Send,
    Timing,
)
from spotspeed.core.cut_fence import plan_after_loss
from spotspeed.core.cut_gate import Gate
from spotspeed.core.cut_gather import Desk, Offer
from spotspeed.core.cut_leader import Leader
from spotspeed.core.cut_member import Member
from spotspeed.core.cut_messages import (
    Closed,
    ClosedHeard,
    Decide,
    Fence,
    Gather,
    Gathered,
    Heard,
    Leave,
    Message,
    Notice,
    Outcome,
    Prepare,
    Report,
    Status,
    Suspect,
    Term,
    Wish,
)
from spotspeed.core.cut_wishes import Wishes


class State(Enum):
    """Whether this rank still takes part."""

    RUNNING = auto()
    CLOSED = auto()
    LEFT = auto()


class CutMachine:
    """The protocol of one rank. Every method returns the actions to take, in order.

    Not thread-safe: one mutex around it. `now` is the driver's monotonic clock in seconds, and
    `unix_offset_s` what to add to it for the time of day. `gate` may be entered directly.
    """

    def __init__(
        self, rank: int, world_size: int, *, now: float, position: int = 0,
        timing: Timing | None = None, unix_offset_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.world_size = world_size
        self.timing = timing or Timing()
        self.gate = Gate(position)
        self.state = State.RUNNING
        self.term = Term(0, 0)
        self.lost: set[int] = set()
        self._gone: set[int] = set()
        self._why_lost = ""
        self._unix_offset_s = unix_offset_s
        self._actions: list[Action] = []
        self._inbox: list[Message] = []
        self.member = Member(self.gate, self.timing, self._to_leader, self._actions)
        self._lead: Leader | None = None
        self._desk: Desk | None = None
        self._wishes = Wishes(self.timing.resend_s, self._to_leader)
        self._suspicion: tuple[int, Suspect, float] | None = None
        self._statuses: dict[int, Status] | None = None
        self._fence_resend_at = 0.0
        self._offer = Offer(self.timing.resend_s, self._to_leader, self._actions)
        if rank == 0:
            self._lead_term(1)

    # Local events.

    def notice(
        self, wish: Wish, seconds_left: float | None, source: str, now: float
    ) -> list[Action]:
        """This rank wants a save or a stop, or closes. Sent until the leader has heard it."""
        if self.state is State.RUNNING:
            self._wishes.add(wish, seconds_left, source, now)
        return self._drain(now)

    def enter(self, position: int, now: float) -> bool:
        """Whether update `position` may begin; it has then begun. Ask again after any action."""
        if self.gate.enter(position):
            self.member.waiting_since = None
            return True
        if self.member.waiting_since is None:
            self.member.waiting_since = now
        return False

    def completed(self, position: int, now: float) -> list[Action]:
        """Update `position` is done."""
        self.gate.complete(position)
        if self.state is State.RUNNING:
            self.member.look(now)
        return self._drain(now)

    def staged(self, round_number: int, now: float) -> list[Action]:
        """What `Capture` asked for is out of the training's memory."""
        self.member.staged(round_number)
        return self._drain(now)

    def durable(self, round_number: int, digest: str | None, now: float) -> list[Action]:
        """This rank's part is durable; `digest` is that of the sealed whole, where known."""
        self.member.durable(round_number, digest)
        return self._drain(now)

    def failed(self, round_number: int, why: str, now: float) -> list[Action]:
        """This rank's part will not become durable."""
        self.member.failed(round_number, why)
        return self._drain(now)

    def delivered(self, round_number: int, now: float) -> list[Action]:
        """A `Settled` has been acted upon."""
        self.member.delivered(round_number, now)
        return self._drain(now)

    def gather(self, label: str, value: bytes, now: float) -> tuple[int, list[Action]]:
        """Begin an exchange; its serial, which `Exchanged` will carry."""
        serial = self._offer.begin(label, value, now)
        if self.lost or self.state is not State.RUNNING:
            self._offer.fail(self._why_lost or "this rank has left the protocol")
        return serial, self._drain(now)

    def missing(self) -> tuple[int, ...]:
        """Ranks that are known not to have joined the running exchange."""
        if self._desk is not None and self._offer.serial is not None:
            return self._desk.missing(self._offer.serial)
        return self._offer.known_missing

    def peer_down(self, rank: int, why: str, now: float) -> list[Action]:
        """A rank is gone: its connection ended, or it was silent for too long."""
        self._lose({rank}, why, now)
        return self._drain(now)

    def tick(self, now: float) -> list[Action]:
        """Act on everything whose time has come; see `wake`."""
        if self.state is not State.RUNNING:
            return self._drain(now)
        self._resend(now)
        self.member.tick(now)
        if self._lead is not None:
            self._lead.tick(now)
            self._close_if_all_have(now)
        return self._drain(now)

    def wake(self) -> float | None:
        """When `tick` has something to do; None: never, unless something else happens."""
        if self.state is not State.RUNNING:
            return None
        times = [self.member.wake(), self._wishes.wake(), self._offer.wake()]
        if self._lead is not None:
            times += [self._lead.wake(), self._lead.close_by]
        if self._suspicion is not None:
            times.append(self._suspicion[2])
        if self._statuses is not None:
            times.append(self._fence_resend_at)
        return min((time for time in times if time is not None), default=None)

    # Messages.

    def receive(self, sender: int, term: Term, message: Message, now: float) -> list[Action]:
        """A message from another rank."""
        if self.state is not State.RUNNING:
            self._afterword(sender, message)
        elif isinstance(message, Fence):
            self._on_fence(sender, term, message, now)
        elif sender in self.lost:
            self._post(sender, Fence(tuple(sorted(self.lost)), self._why_lost))
        elif isinstance(message, Suspect):
            self._lose(set(message.lost), f"rank {sender} says: {message.why}", now)
        elif term == self.term:
            self._dispatch(sender, message, now)
        return self._drain(now)

    def _dispatch(self, sender: int, message: Message, now: float) -> None:
        if isinstance(message, _OF_LEADER):
            if sender == self.term.leader:
                self._on_word(message, now)
        elif isinstance(message, Status):
            if self._statuses is not None:
                self._statuses[sender] = message
                self._conclude_fence(now)
        elif self._lead is not None and self._desk is not None:
            if isinstance(message, Notice):
                self._lead.wish(sender, message, now)
            elif isinstance(message, Report):
                self._lead.report(sender, message, now)
            elif isinstance(message, ClosedHeard):
                self._lead.closed_heard.add(sender)
                self._close_if_all_have(now)
            elif isinstance(message, Gather):
                self._desk.take(sender, message)

    def _on_word(self, message: Message, now: float) -> None:
        """The leader speaks."""
        if isinstance(message, Prepare | Decide | Outcome):
            self.member.receive(message, now)
        elif isinstance(message, Heard):
            self._wishes.heard(message.serial, now)
        elif isinstance(message, Leave):
            self._on_leave(message, now)
        elif isinstance(message, Closed):
            self._to_leader(ClosedHeard())
            self._all_closed()
        elif isinstance(message, Gathered):
            self._offer.answered(message)

    def _on_leave(self, message: Leave, now: float) -> None:
        self.gate.lock()
        self.member.depart(message, now)
        self._offer.fail("the job is leaving")
        self.state = State.LEFT

    def _afterword(self, sender: int, message: Message) -> None:
        """Help those who have not heard the last word."""
        if self.state is State.CLOSED and isinstance(message, Closed):
            self._post(sender, ClosedHeard())
        elif self._lead is not None and isinstance(message, Report | Notice | Suspect):
            last = self._lead.left if self.state is State.LEFT else Closed()
            if last is not None:
                self._post(sender, last)

    # Loss of ranks.

    def _lose(self, ranks: set[int], why: str, now: float) -> None:
        fresh = ranks - self._gone - {self.rank}
        if not fresh or self.state is not State.RUNNING:
            return
        if self._lead is not None and self._lead.close_by is not None:
            self._lead.closed_heard |= fresh
            self._close_if_all_have(now)
            return
        self._gone |= fresh
        why = self._why_lost or f"rank {min(fresh)} is lost: {why}"
        first = min(rank for rank in range(self.world_size) if rank not in self._gone)
        if first != self.rank:
            suspect = Suspect(tuple(sorted(self._gone)), why)
            self._suspicion = (first, suspect, now + self.timing.resend_s)
            self._post(first, suspect)
        if first == self.rank or first != self.term.leader:
            self._give_up(self._gone, why)
        if first == self.rank:
            self._begin_fence(now)

    def _give_up(self, ranks: set[int], why: str) -> None:
        """The job is over: these ranks are lost. (A living leader may know that they have left.)"""
        fresh = sorted(ranks - self.lost)
        self.lost |= ranks
        self._gone |= ranks
        self._why_lost = self._why_lost or why
        self.member.fence()
        self._actions.extend(PeerLost(rank, why) for rank in fresh)
        self._offer.fail(self._why_lost)

    def _begin_fence(self, now: float) -> None:
        self.term = Term(self.term.counter + 1, self.rank)
        self._lead, self._desk, self._suspicion = None, None, None
        self._statuses = {self.rank: self._status(now)}
        self._fence_resend_at = now
        self._send_fence(now)
        self._conclude_fence(now)

    def _send_fence(self, now: float) -> None:
        assert self._statuses is not None
        self._fence_resend_at = now + self.timing.resend_s
        for rank in self._living():
            if rank not in self._statuses:
                self._post(rank, Fence(tuple(sorted(self.lost)), self._why_lost))

    def _on_fence(self, sender: int, term: Term, message: Fence, now: float) -> None:
        if self.rank in message.lost:
            self._on_leave(Leave(0, None, f"rank {sender} gave this rank up: {message.why}"), now)
        elif sender in self.lost:
            self._post(sender, Fence(tuple(sorted(self.lost)), self._why_lost))
        elif term == self.term and sender == term.leader:
            self._post(sender, self._status(now))
        elif term > self.term and sender == term.leader:
            self.term = term
            self._lead, self._desk, self._suspicion, self._statuses = None, None, None, None
            unknown = self._gone - set(message.lost)
            self._give_up(set(message.lost), message.why)
            self._post(sender, self._status(now))
            if unknown:
                suspect = Suspect(tuple(sorted(unknown)), self._why_lost)
                self._suspicion = (sender, suspect, now + self.timing.resend_s)
                self._post(sender, suspect)

    def _status(self, now: float) -> Status:
        started = self.member.fence()
        ends = [self._wishes.deadline(), self.member.deadline()]
        left = min((end - now for end in ends if end is not None), default=None)
        views = tuple(held.view() for held in self.member.rounds.values())
        return Status(started, self.member.top_round, left, views)

    def _conclude_fence(self, now: float) -> None:
        living = self._living()
        if self._statuses is None or any(rank not in self._statuses for rank in living):
            return
        plan = plan_after_loss(self._statuses, self._why_lost)
        self._statuses = None
        lead = self._lead_term(plan.next_round)
        left = self.timing.after_loss_s
        deadline = now + (left if plan.seconds_left is None else min(left, plan.seconds_left))
        for cut, outcome in plan.ended:
            lead.adopt(cut, outcome, None, now)
        if plan.adopted is not None:
            lead.adopt(plan.adopted, None, deadline, now)
        elif not plan.is_stopped:
            lead.settle(plan.step, deadline, now)

    # Time.

    def _resend(self, now: float) -> None:
        self._wishes.tick(now)
        if self._suspicion is not None and now >= self._suspicion[2]:
            to, suspect, _ = self._suspicion
            self._suspicion = (to, suspect, now + self.timing.resend_s)
            self._post(to, suspect)
        if self._statuses is not None and now >= self._fence_resend_at:
            self._send_fence(now)
        self._offer.tick(now)

    def _living(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank not in self.lost]

    def _lead_term(self, next_round: int) -> Leader:
        members = tuple(self._living())
        self._lead = Leader(
            self.rank, self.term, members, tuple(sorted(self.lost)), self.timing,
            self._unix_offset_s, self._post, next_round,
        )  # fmt: skip
        self._desk = Desk(members, self._post)
        return self._lead

    def _close_if_all_have(self, now: float) -> None:
        if self._lead is not None and self._lead.is_closed(now):
            self._all_closed()

    def _all_closed(self) -> None:
        if self.state is not State.RUNNING:
            return
        self.state = State.CLOSED
        self._offer.fail("all ranks have closed")
        self._actions.append(AllClosed())

    def _to_leader(self, message: Message) -> None:
        self._post(self.term.leader, message)

    def _post(self, to: int, message: Message) -> None:
        if to == self.rank:
            self._inbox.append(message)
        elif to not in self.lost or isinstance(message, Fence):
            self._actions.append(Send(to, self.term, message))

    def _drain(self, now: float) -> list[Action]:
        """Handle what this rank says to itself, then hand out the actions."""
        while self._inbox:
            message = self._inbox.pop(0)
            if self.state is State.RUNNING:
                self._dispatch(self.rank, message, now)
        actions = self._actions[:]
        self._actions.clear()
        return actions


_OF_LEADER = (Prepare, Decide, Outcome, Heard, Leave, Closed, Gathered)
