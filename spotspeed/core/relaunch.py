"""What a supervisor makes of a launch that has ended: its exit code, and whether to start again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

EXIT_ERROR = 1
"""What torchrun says of ranks that were killed as well as of those that failed."""
EXIT_DURABLE = 75
EXIT_NOT_DURABLE = 76
EXIT_DO_NOT_REQUEUE = 77
LOST_CODES = frozenset({137, 143, 129, 247, 241, 255})
"""Ends by SIGKILL, SIGTERM or SIGHUP as shells (128 + n), as `deepspeed` (256 - n) tell them, and
mpirun's after a lost node."""


class Ending(Enum):
    """How a launch ended."""

    DONE = auto()
    DURABLE = auto()
    NOT_DURABLE = auto()
    LOST = auto()
    """Killed from outside, without a word of the ranks."""
    REFUSED = auto()
    FAILED = auto()


@dataclass(frozen=True, slots=True)
class Traces:
    """What a launch left behind. `rank_codes` are those with which ranks said that they leave.

    `closed` of the `attached` ranks have closed their checkpointer; `is_notice_sealed`: the store
    holds a sealed checkpoint of this launch that a notice caused. `errors` name what the scripts of
    ranks have failed with by themselves. `is_noticed`: the supervisor was told to leave before the
    end; `is_ended`: it has ended the launch.
    """

    launcher_code: int
    rank_codes: tuple[int, ...] = ()
    attached: int = 0
    closed: int = 0
    is_notice_sealed: bool = False
    errors: tuple[str, ...] = ()
    is_noticed: bool = False
    is_ended: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the launch ended, the exit code that says so, and why."""

    ending: Ending
    code: int
    reason: str


def judge(traces: Traces) -> Verdict:
    """The end of a launch by what its ranks said and what is durable; the launcher's code last.

    torchrun gives 1 whatever its ranks returned, and mpirun 0 after a lost node. When the script
    of one rank fails, the others leave as they do when a rank is lost: its word is the first.
    """
    launcher, codes = traces.launcher_code, traces.rank_codes
    durable = [code for code in codes if code not in (EXIT_NOT_DURABLE, EXIT_DO_NOT_REQUEUE)]
    if EXIT_DO_NOT_REQUEUE in (launcher, *codes):
        return Verdict(Ending.REFUSED, EXIT_DO_NOT_REQUEUE, "a rank says: do not start again")
    if traces.errors:
        is_plain = launcher in (0, EXIT_DURABLE, EXIT_NOT_DURABLE, *durable)
        code = EXIT_ERROR if is_plain else launcher
        return Verdict(Ending.FAILED, code, f"the script failed with {traces.errors[0]}")
    if durable:
        return Verdict(Ending.DURABLE, durable[0], "the ranks say that the last step is durable")
    is_cut_off = traces.closed < traces.attached
    if traces.is_notice_sealed and (launcher != 0 or is_cut_off):
        return Verdict(Ending.DURABLE, EXIT_DURABLE, "the notice's checkpoint is sealed")
    if EXIT_NOT_DURABLE in (launcher, *codes):
        return Verdict(Ending.NOT_DURABLE, EXIT_NOT_DURABLE, "the last step is not durable")
    if launcher == EXIT_DURABLE:
        return Verdict(Ending.DURABLE, EXIT_DURABLE, "the launcher says that it is durable")
    return _without_a_word(traces)


def _without_a_word(traces: Traces) -> Verdict:
    """The verdict where neither a rank nor the store says how the launch ended."""
    launcher, is_silent = traces.launcher_code, traces.attached > 0 and not traces.closed
    if launcher == 0 and is_silent:
        return Verdict(Ending.LOST, EXIT_NOT_DURABLE,
                       "the launcher says 0, but no rank has come to its end")  # fmt: skip
    if launcher == 0:
        return Verdict(Ending.DONE, 0, "done")
    is_lost = launcher in LOST_CODES or (launcher == EXIT_ERROR and is_silent)
    if traces.is_noticed and (traces.is_ended or is_lost):
        return Verdict(Ending.NOT_DURABLE, EXIT_NOT_DURABLE,
                       "interrupted, and nobody says that the last step is durable")  # fmt: skip
    if is_lost:
        return Verdict(Ending.LOST, launcher, f"killed, exit code {launcher}")
    return Verdict(Ending.FAILED, launcher, f"failed with exit code {launcher}")


@dataclass(frozen=True, slots=True)
class Policy:
    """When to start again: at most `max_restarts` in `window_s` seconds, with growing pauses."""

    max_restarts: int = 10
    window_s: float = 3600.0
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to start again, after `delay_s`, and why."""

    relaunch: bool
    reason: str
    delay_s: float = 0.0


def decide(
    verdict: Verdict, policy: Policy, *, past_s: Sequence[float], now_s: float, is_doomed: bool
) -> Decision:
    """Whether to start again at `now_s`; `past_s` are the times of the relaunches so far.

    `is_doomed`: the supervisor's own machine goes away, or a person told it to stop.
    """
    if verdict.ending not in (Ending.DURABLE, Ending.NOT_DURABLE, Ending.LOST):
        return Decision(False, verdict.reason)
    if is_doomed:
        return Decision(False, "the supervisor itself was told to leave")
    recent = [moment for moment in past_s if now_s - moment < policy.window_s]
    if len(recent) >= policy.max_restarts:
        return Decision(False, f"{len(recent)} restarts within {policy.window_s:g} s")
    delay_s = min(policy.backoff_s * 2.0 ** len(recent), policy.backoff_max_s)
    return Decision(True, verdict.reason, 0.0 if not recent else delay_s)


@dataclass(frozen=True, slots=True)
class Batch:
    """The global batch and the micro batch of one rank, in samples."""

    train: int
    micro: int

    def fits(self, ranks: int) -> bool:
        """Whether DeepSpeed can derive whole accumulation steps for so many ranks."""
        return ranks > 0 and self.train % (self.micro * ranks) == 0

    def __str__(self) -> str:
        return f"a batch of {self.train} in micro batches of {self.micro}"


@dataclass(frozen=True, slots=True)
class Fits:
    """The numbers of ranks that the job itself named when it could not run on others."""

    ranks: frozenset[int]

    def fits(self, ranks: int) -> bool:
        """Whether the job named this number."""
        return ranks in self.ranks

    def __str__(self) -> str:
        return "the job's batch"


@dataclass(frozen=True, slots=True)
class Choice:
    """A number of ranks, 0 when none fits, and why."""

    ranks: int
    reason: str


def choose_ranks(slots: int, batch: Batch | Fits | None, *, min_ranks: int = 1) -> Choice:
    """The largest number of ranks for so many slots that keeps the global batch as it is."""
    if slots < 1:
        return Choice(0, "no slot is left: no host of the hostfile answers")
    fitting = [n for n in range(1, slots + 1) if batch is None or batch.fits(n)]
    if not fitting:
        return Choice(
            0, f"{slots} slots are left, and {batch or 'nothing'} fits none of 1..{slots} ranks"
        )
    ranks = fitting[-1]
    if ranks < min_ranks:
        return Choice(0, f"{slots} slots give {ranks} ranks; at least {min_ranks} are wanted")
    if ranks < slots:
        return Choice(ranks, f"{slots} slots are left; the global batch divides by {ranks}")
    return Choice(ranks, f"{slots} slots are left")
