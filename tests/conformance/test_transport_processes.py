"""Ranks as processes: killed, stopped, forking; each fact by real signals on real processes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

RANK = """
import json, os, select, sys, time
from pathlib import Path
from spotspeed.coordinator.bootstrap import bootstrap
from spotspeed.coordinator.transport import PeerDown
from spotspeed.testing.network import DirectoryRendezvous

directory, rank, world_size, peer_timeout_s = sys.argv[1:]
transport = bootstrap(rank=int(rank), world_size=int(world_size),
                      peer_timeout_s=float(peer_timeout_s), timeout_s=30,
                      rendezvous=DirectoryRendezvous(Path(directory)))

def tell(**facts):
    print(json.dumps(facts), flush=True)

tell(up=True)
poller = select.poll()
poller.register(transport.fileno(), select.POLLIN)
poller.register(0, select.POLLIN)
while True:
    ready = [fd for fd, _ in poller.poll(transport.wait_s() * 1000)]
    for event in transport.handle():
        if isinstance(event, PeerDown):
            tell(down=event.rank, why=event.why, orderly=event.is_orderly, at=time.monotonic())
        else:
            tell(sender=event.sender, payload=event.payload.decode())
    if 0 in ready:
        words = sys.stdin.readline().split()
        if not words:
            transport.close(drain_s=5)
            break
        if words[0] == "send":
            transport.send(int(words[1]), words[2].encode())
        elif words[0] == "fork":
            child = os.fork()
            if child == 0:
                tell(child=os.getpid())
                time.sleep(60)
                os._exit(0)
"""


@dataclass
class Rank:
    """One rank's process, told what to do by lines, telling what happened by lines."""

    process: subprocess.Popen[bytes]
    told: list[dict[str, object]]
    partial: bytes = b""

    def order(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def wait_for(
        self, fact: Callable[[dict[str, object]], bool], timeout_s: float = 20.0
    ) -> dict[str, object]:
        deadline_s = time.monotonic() + timeout_s
        while True:
            for told in self.told:
                if fact(told):
                    return told
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"not told in {timeout_s} s; told: {self.told}"
            self.read(left_s)

    def read(self, timeout_s: float) -> None:
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        if select.select([fd], [], [], timeout_s)[0]:
            *lines, self.partial = (self.partial + os.read(fd, 65536)).split(b"\n")
            self.told += [json.loads(line) for line in lines]

    def downs(self) -> list[dict[str, object]]:
        return [told for told in self.told if "down" in told]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[[int, float], list[Rank]]]:
    ranks: list[Rank] = []

    def start(world_size: int, peer_timeout_s: float) -> list[Rank]:
        for rank in range(world_size):
            arguments = [str(tmp_path), str(rank), str(world_size), str(peer_timeout_s)]
            process = subprocess.Popen(
                [sys.executable, "-c", RANK, *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            ranks.append(Rank(process, []))
        for rank in ranks:
            rank.wait_for(lambda told: "up" in told, 40)
        return ranks

    yield start
    for rank in ranks:
        rank.process.kill()
        rank.process.wait()
        for pipe in (rank.process.stdin, rank.process.stdout):
            assert pipe is not None
            pipe.close()


def test_a_killed_rank_is_noticed_at_once(launch: Callable[[int, float], list[Rank]]) -> None:
    zero, one, two = launch(3, 60.0)
    begin_s = time.monotonic()
    one.process.kill()
    told = zero.wait_for(lambda told: told.get("down") == 1)
    assert isinstance(told["at"], float)
    assert told["at"] - begin_s < 10.0
    assert not told["orderly"]
    two.order("send 0 alive")
    zero.wait_for(lambda told: told.get("payload") == "alive")
    assert len(zero.downs()) == 1
    assert not two.downs()


def test_after_rank_0_is_killed_the_others_talk(
    launch: Callable[[int, float], list[Rank]],
) -> None:
    zero, one, two = launch(3, 60.0)
    zero.process.kill()
    for rank in (one, two):
        rank.wait_for(lambda told: told.get("down") == 0)
    two.order("send 1 lead")
    one.wait_for(lambda told: told.get("payload") == "lead")
    one.order("send 2 follow")
    two.wait_for(lambda told: told.get("payload") == "follow")


def test_a_short_stop_costs_nothing_and_what_was_sent_meanwhile_arrives(
    launch: Callable[[int, float], list[Rank]],
) -> None:
    zero, one = launch(2, 3.0)
    one.process.send_signal(signal.SIGSTOP)
    zero.order("send 1 patience")
    zero.read(1.2)
    one.process.send_signal(signal.SIGCONT)
    one.wait_for(lambda told: told.get("payload") == "patience")
    one.order("send 0 thanks")
    zero.wait_for(lambda told: told.get("payload") == "thanks")
    assert not zero.downs()
    assert not one.downs()


def test_a_long_stop_is_a_loss_and_the_stopped_rank_learns_it(
    launch: Callable[[int, float], list[Rank]],
) -> None:
    zero, one = launch(2, 1.0)
    one.process.send_signal(signal.SIGSTOP)
    begin_s = time.monotonic()
    told = zero.wait_for(lambda told: told.get("down") == 1)
    assert isinstance(told["at"], float)
    assert 0.5 < told["at"] - begin_s < 6.0
    assert "silent" in str(told["why"])
    one.process.send_signal(signal.SIGCONT)
    assert "closed" in str(one.wait_for(lambda told: told.get("down") == 0)["why"])


def test_a_stop_of_all_ranks_longer_than_the_timeout_costs_nothing(
    launch: Callable[[int, float], list[Rank]],
) -> None:
    zero, one = launch(2, 2.0)
    for rank in (zero, one):
        rank.process.send_signal(signal.SIGSTOP)
    zero.read(3.0)
    for rank in (one, zero):
        rank.process.send_signal(signal.SIGCONT)
    one.order("send 0 resumed")
    zero.wait_for(lambda told: told.get("payload") == "resumed")
    zero.read(0.5)
    assert not zero.downs()
    assert not one.downs()


def test_a_forked_child_that_lives_on_does_not_hide_the_death(
    launch: Callable[[int, float], list[Rank]],
) -> None:
    zero, one = launch(2, 60.0)
    one.order("fork")
    child = one.wait_for(lambda told: "child" in told)["child"]
    assert isinstance(child, int)
    try:
        one.process.kill()
        zero.wait_for(lambda told: told.get("down") == 1, 5)
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_parent_talks_on_after_a_fork(launch: Callable[[int, float], list[Rank]]) -> None:
    zero, one = launch(2, 2.0)
    one.order("fork")
    child = one.wait_for(lambda told: "child" in told)["child"]
    assert isinstance(child, int)
    try:
        zero.read(2.5)
        one.order("send 0 here")
        zero.wait_for(lambda told: told.get("payload") == "here")
        assert not zero.downs()
    finally:
        os.kill(child, signal.SIGKILL)


def test_an_orderly_end_is_told_as_such(launch: Callable[[int, float], list[Rank]]) -> None:
    zero, one = launch(2, 60.0)
    one.order("send 0 last")
    assert one.process.stdin is not None
    one.process.stdin.close()
    told = zero.wait_for(lambda told: "down" in told)
    assert told["orderly"]
    assert {"sender": 1, "payload": "last"} in zero.told
    assert one.process.wait(10) == 0
