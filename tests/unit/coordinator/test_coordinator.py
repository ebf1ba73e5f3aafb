"""Coordinators of several ranks in one process, over real sockets: what a training relies on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from spotspeed.config import SpotSpeedConfig, parse_block
from spotspeed.coordinator import coordinator as coordinators
from spotspeed.coordinator.coordinator import Coordinator, Cut, GateVerdict
from spotspeed.errors import CoordinationError, CutTimeoutError, PeerLostError
from spotspeed.testing import network as networks
from spotspeed.testing.network import single_transport, socket_network

WAIT_S = 20.0


@pytest.fixture(params=["python", "native"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test here runs with the control thread in Python and with the native one."""
    monkeypatch.setattr(networks, "kind", request.param)
    return str(request.param)


class Saver:
    """A listener that saves in no time, unless it is told to hold its captures."""

    def __init__(self) -> None:
        self.coordinator: Coordinator
        self.changed = threading.Condition()
        self.captures: list[Cut] = []
        self.outcomes: list[tuple[Cut, str | None, str]] = []
        self.notices: list[tuple[str, float]] = []
        self.lost, self.left = list[int](), list[str]()
        self.is_holding = False

    def on_notice(self, source: str, seconds_left: float) -> None:
        self._note(self.notices, (source, seconds_left))

    def on_agreed(self, cut: Cut) -> None: ...
    def on_capture(self, cut: Cut) -> None:
        self._note(self.captures, cut)
        if not self.is_holding:
            self.save(cut)

    def save(self, cut: Cut) -> None:
        self.coordinator.report_staged(cut.round)
        self.coordinator.report_durable(cut.round, f"seal of {cut.attempt}")

    def on_outcome(self, cut: Cut, digest: str | None, why: str) -> None:
        self._note(self.outcomes, (cut, digest, why))

    def on_peer_lost(self, rank: int, why: str) -> None:
        self._note(self.lost, rank)

    def leave(self, why: str) -> None:
        self._note(self.left, why)

    def wait(self, is_so: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(is_so, WAIT_S), vars(self)

    def _note(self, where: list, what: object) -> None:
        with self.changed:
            where.append(what)
            self.changed.notify_all()


class Job:
    """Coordinators and savers by rank, and updates that nobody leaves before all have entered."""

    def __init__(self, coordinators: list[Coordinator], savers: list[Saver]) -> None:
        self.coordinators = coordinators
        self.savers = savers
        self.pool = ThreadPoolExecutor(len(coordinators))
        self.collective = threading.Barrier(len(coordinators))

    def each(self, call: Callable[[int], object]) -> list[object]:
        """`call(rank)` on all ranks at the same time."""
        ranks = range(len(self.coordinators))
        return [future.result(WAIT_S) for future in [self.pool.submit(call, r) for r in ranks]]

    def train(self, rank: int, *, until: int, first: int = 1, work_s: float = 0.0) -> int:
        """Updates `first` to `until`; the last one completed."""
        coordinator = self.coordinators[rank]
        for step in range(first, until + 1):
            time.sleep(work_s * (rank + 1))
            if coordinator.gate(step) is GateVerdict.LEAVE:
                return step - 1
            self.collective.wait(WAIT_S)
            coordinator.completed(step)
        return until

    def start(self, step: int = 0) -> None:
        self.each(lambda rank: self.coordinators[rank].start(step))


def config(**sections: object) -> SpotSpeedConfig:
    return parse_block({"path": "/unused", "notice": {"signals": []}, **sections})


@contextlib.contextmanager
def job_of(size: int, **sections: object) -> Iterator[Job]:
    with socket_network(size) as network:
        savers = [Saver() for _ in range(size)]
        for rank in range(1, size):
            network.transports[rank].connect(0)
        coordinators = []
        for rank, saver in enumerate(savers):
            saver.coordinator = Coordinator(network.transports[rank], config(**sections), saver)
            coordinators.append(saver.coordinator)
        job = Job(coordinators, savers)
        job.each(lambda rank: coordinators[rank].exchange("connected", b""))
        try:
            yield job
        finally:
            job.collective.abort()
            for coordinator in coordinators:
                coordinator.close(0.0)
            job.pool.shutdown()


@pytest.mark.parametrize("size", [2, 4])
def test_a_notice_on_any_rank_stops_all_at_one_saved_step(size: int) -> None:
    with job_of(size) as job:
        job.start()
        running = [job.pool.submit(job.train, rank, until=100_000) for rank in range(size)]
        time.sleep(0.05)
        job.coordinators[size - 1].notice("test", 60.0)
        steps = {future.result(WAIT_S) for future in running}
        assert len(steps) == 1
        for saver in job.savers:
            ((cut, digest, why),) = saver.outcomes
            assert (cut.step, cut.stop, digest, why) == (*steps, True, "seal of c0001", "")
        tickets = {(c.attempt, c.created_unix_s, c.step) for s in job.savers for c in s.captures}
        assert len(tickets) == 1
        assert [saver.notices for saver in job.savers[:-1]] == [[]] * (size - 1)
        assert job.savers[-1].notices == [("test", 60.0)]


def test_a_save_is_of_one_step_and_the_training_goes_on() -> None:
    with job_of(3) as job:
        job.start()
        running = [job.pool.submit(job.train, rank, until=300, work_s=0.0005) for rank in range(3)]
        for _ in range(3):
            job.coordinators[2].request_snapshot()
            time.sleep(0.05)
        assert [future.result(WAIT_S) for future in running] == [300] * 3
        assert job.each(lambda rank: job.coordinators[rank].close(WAIT_S)) == [GateVerdict.GO] * 3
        cuts = [[(c.step, c.attempt) for c in saver.captures] for saver in job.savers]
        assert cuts[0] and cuts[0] == cuts[1] == cuts[2]


def test_no_update_begins_before_the_own_state_is_staged() -> None:
    with job_of(2) as job:
        job.start()
        job.savers[1].is_holding = True
        job.coordinators[0].request_snapshot()
        job.savers[1].wait(lambda: bool(job.savers[1].captures))
        entered = job.pool.submit(job.coordinators[1].gate, 1)
        assert job.coordinators[0].gate(1) is GateVerdict.GO
        time.sleep(0.1)
        assert not entered.done()
        job.savers[1].save(job.savers[1].captures[0])
        assert entered.result(WAIT_S) is GateVerdict.GO


def test_a_save_that_holds_a_step_too_long_is_abandoned_on_all_ranks() -> None:
    with job_of(2, staging={"max_hold_s": 0.1}) as job:
        job.start()
        job.savers[1].is_holding = True
        job.coordinators[0].request_snapshot()
        job.savers[1].wait(lambda: bool(job.savers[1].captures))
        assert job.coordinators[1].gate(1) is GateVerdict.GO
        for saver in job.savers:
            saver.wait(lambda saver=saver: bool(saver.outcomes))
            assert saver.outcomes[0][1:] == (None, "rank 1: held a step for 0.1 s")


def test_a_listener_that_raises_fails_the_save_and_nothing_else() -> None:
    with job_of(2) as job:
        job.start()

        def refuse(cut: Cut) -> None:
            raise OSError("no room")

        job.savers[1].on_capture = refuse
        job.coordinators[0].request_snapshot()
        job.savers[0].wait(lambda: bool(job.savers[0].outcomes))
        assert job.savers[0].outcomes[0][1:] == (None, "rank 1: OSError: no room")
        assert job.each(lambda rank: job.train(rank, until=5)) == [5, 5]


def test_a_main_thread_that_does_not_come_is_made_to_leave() -> None:
    with job_of(2) as job:
        job.start()
        job.coordinators[0].notice("test", 60.0)
        job.savers[0].wait(lambda: bool(job.savers[0].captures))
        assert job.coordinators[0].gate(1) is GateVerdict.LEAVE
        job.savers[1].wait(lambda: bool(job.savers[1].left))
        assert job.savers[1].left == ["all ranks leave"]
        assert job.coordinators[1].gate(1) is GateVerdict.LEAVE
        assert job.savers[0].left == []


def test_a_late_notice_saves_the_last_step_while_others_are_closing() -> None:
    with job_of(3) as job:
        job.start()
        assert job.each(lambda rank: job.train(rank, until=4)) == [4] * 3
        closing = [job.pool.submit(job.coordinators[rank].close, WAIT_S) for rank in (0, 2)]
        job.coordinators[2].notice("test", 60.0)
        assert [future.result(WAIT_S) for future in closing] == [GateVerdict.LEAVE] * 2
        assert job.coordinators[1].gate(5) is GateVerdict.LEAVE
        assert {(s.outcomes[0][0].step, s.outcomes[0][1]) for s in job.savers} == {
            (4, "seal of c0001")
        }


def test_close_waits_for_all_ranks_and_says_which_call_is_missing() -> None:
    with job_of(2) as job, pytest.raises(CutTimeoutError, match=r"close\(\) on every rank"):
        job.coordinators[1].close(0.1)
    with job_of(2) as job:
        assert job.each(lambda rank: job.coordinators[rank].close(WAIT_S)) == [GateVerdict.GO] * 2


def test_a_notice_before_anything_was_trained_asks_for_what_there_was_before() -> None:
    with job_of(2) as job:
        job.coordinators[1].notice("test", 60.0)
        for saver in job.savers:
            saver.wait(lambda saver=saver: bool(saver.left))
            assert {cut.step for cut in saver.captures} == {-1}
            ((cut, digest, _),) = saver.outcomes
            assert (cut.step, digest) == (-1, f"seal of {cut.attempt}")
        assert job.each(lambda rank: job.coordinators[rank].start(7)) == [GateVerdict.LEAVE] * 2


def test_before_anything_was_trained_all_may_leave_without_a_save() -> None:
    with job_of(2) as job:
        for saver in job.savers:
            saver.is_holding = True
        job.coordinators[1].notice("test", 60.0)
        for saver, coordinator in zip(job.savers, job.coordinators, strict=True):
            saver.wait(lambda saver=saver: bool(saver.captures))
            coordinator.report_failed(saver.captures[0].round, "there is nothing yet")
        for saver in job.savers:
            saver.wait(lambda saver=saver: bool(saver.left))
        assert {saver.left[0].partition(": ")[2] for saver in job.savers} == {
            "there is nothing yet"
        }
        assert job.each(lambda rank: job.coordinators[rank].start(7)) == [GateVerdict.LEAVE] * 2


def test_steps_may_jump_back_when_a_state_is_loaded() -> None:
    with job_of(2) as job:
        job.start(100)
        assert job.each(lambda rank: job.train(rank, first=101, until=103)) == [103] * 2
        job.start(50)
        job.coordinators[0].notice("test", 60.0)
        last = job.each(lambda rank: job.train(rank, first=51, until=10_000))
        assert len(set(last)) == 1 and 50 <= last[0] < 10_000
        assert {saver.captures[0].step for saver in job.savers} == set(last)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_the_survivors_of_a_lost_rank_stop_at_one_step_and_leave(victim: int) -> None:
    with job_of(3) as job:
        job.start()
        assert job.each(lambda rank: job.train(rank, until=3)) == [3] * 3
        waiting = [job.pool.submit(job.coordinators[r].gate, 4) for r in range(3) if r != victim]
        assert all(future.result(WAIT_S) is GateVerdict.GO for future in waiting)
        for rank in set(range(3)) - {victim}:
            job.coordinators[rank].completed(4)
        job.coordinators[victim].close(0.0)
        for rank in set(range(3)) - {victim}:
            saver = job.savers[rank]
            saver.wait(lambda saver=saver: saver.lost == [victim])
            assert job.coordinators[rank].gate(5) is GateVerdict.LEAVE
            ((cut, digest, _),) = saver.outcomes
            assert (cut.step, cut.lost) == (4, (victim,))
            assert digest == f"seal of {cut.attempt}" and "t1r" in cut.attempt


def test_a_survivor_in_a_dead_collective_is_made_to_leave_without_the_grace_of_a_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coordinators, "LEAVE_GRACE_S", 10 * WAIT_S)
    with job_of(2, coordinator={"peer_timeout_s": 10 * WAIT_S}) as job:
        job.start()
        assert job.coordinators[0].gate(1) is GateVerdict.GO
        job.coordinators[1].close(0.0)
        saver = job.savers[0]
        saver.wait(lambda: bool(saver.left))
        ((cut, digest, why),) = saver.outcomes
        assert (cut.step, digest, saver.captures) == (1, None, []) and "stuck" in why


def test_an_exchange_with_a_lost_rank_fails_on_all_others() -> None:
    with job_of(3) as job:
        waiting = [job.pool.submit(job.coordinators[rank].exchange, "x", b"") for rank in (0, 2)]
        job.coordinators[1].close(0.0)
        for future in waiting:
            with pytest.raises(PeerLostError, match="rank 1 is lost"):
                future.result(WAIT_S)


def test_one_rank_needs_no_sockets() -> None:
    saver = Saver()
    coordinator = saver.coordinator = Coordinator(single_transport(), config(), saver)
    assert coordinator.exchange("x", b"me") == [b"me"]
    coordinator.start(3)
    assert coordinator.gate(4) is GateVerdict.GO
    coordinator.notice("test", 5.0)
    coordinator.completed(4)
    saver.wait(lambda: bool(saver.outcomes))
    assert coordinator.gate(5) is GateVerdict.LEAVE
    assert [(cut.step, digest) for cut, digest, _ in saver.outcomes] == [(4, "seal of c0001")]
    assert coordinator.close(1.0) is GateVerdict.LEAVE


def test_an_idle_control_thread_costs_no_processor_time() -> None:
    with job_of(2):
        before = time.process_time()
        time.sleep(1.0)
        assert time.process_time() - before < 0.05


def test_a_closed_coordinator_says_so() -> None:
    coordinator = Coordinator(single_transport(), config(), Saver())
    assert coordinator.close(1.0) is GateVerdict.GO
    assert coordinator.close(1.0) is GateVerdict.GO
    coordinator.request_snapshot()
    with pytest.raises(CoordinationError, match="closed already"):
        coordinator.exchange("x", b"")


def test_ranks_sleep_while_they_wait_at_their_gates() -> None:
    with job_of(3) as job:
        job.start()
        for saver in job.savers:
            saver.is_holding = True
        job.coordinators[1].request_snapshot()
        for saver in job.savers:
            saver.wait(lambda saver=saver: bool(saver.captures))
        waiting = [job.pool.submit(job.coordinators[rank].gate, 1) for rank in range(3)]
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.1
        for saver in job.savers:
            saver.save(saver.captures[0])
        assert [future.result(WAIT_S) for future in waiting] == [GateVerdict.GO] * 3
