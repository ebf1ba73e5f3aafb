"""Decides which address of a peer to try next, and when to give up; no I/O, time is an argument."""

from __future__ import annotations

from collections.abc import Sequence

_REFUSED_ROUNDS_MAX = 3
_BACKOFF_FIRST_S = 0.05
_BACKOFF_MAX_S = 1.0


class Dial:
    """One attempt after another over `hosts`, round after round, until `deadline_s`.

    A rank listens before it publishes its addresses: when all of them refuse in three rounds, its
    process is gone and there is no need to wait for the deadline.
    """

    def __init__(self, hosts: Sequence[str], *, now_s: float, timeout_s: float) -> None:
        self.due_s = now_s
        self.deadline_s = now_s + timeout_s
        self.is_given_up = False
        self.why = ""
        self._hosts = tuple(hosts)
        self._next = 0
        self._backoff_s = _BACKOFF_FIRST_S
        self._is_round_refused = True
        self._refused_rounds = 0

    def next_host(self) -> str:
        """The address to try now."""
        return self._hosts[self._next]

    def failed(self, why: str, *, is_refused: bool, now_s: float) -> None:
        """The attempt at `next_host` failed: sets `due_s` for the next one, or `is_given_up`."""
        self.why = f"{self._hosts[self._next]}: {why}"
        self._is_round_refused = self._is_round_refused and is_refused
        self._next += 1
        self.due_s = now_s
        if self._next == len(self._hosts):
            self._end_round(now_s)
        self.is_given_up = self.is_given_up or now_s >= self.deadline_s

    def shift(self, pause_s: float) -> None:
        """This process itself was paused for `pause_s`: the peer does not pay for it."""
        self.due_s += pause_s
        self.deadline_s += pause_s

    def _end_round(self, now_s: float) -> None:
        self._refused_rounds = self._refused_rounds + 1 if self._is_round_refused else 0
        self.is_given_up = self._refused_rounds >= _REFUSED_ROUNDS_MAX
        self._next = 0
        self._is_round_refused = True
        self.due_s = now_s + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, _BACKOFF_MAX_S)
