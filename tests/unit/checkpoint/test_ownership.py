"""Claiming a path: races, restarts after a kill, living and silent owners."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from spotspeed.checkpoint.ownership import (
    OWNER_KEY,
    Claim,
    Clock,
    claim_epoch,
    epoch_key,
    living_owner,
    read_epochs,
    read_owner,
    read_restored,
    record_restored_from,
    release,
    renew,
    restored_key,
)
from spotspeed.checkpoint.processes import this_process
from spotspeed.core.lineage import Place
from spotspeed.core.owner import Identity, encode_owner
from spotspeed.errors import FormatError, ObjectNotFoundError, OwnedError, StorageError
from spotspeed.storage.contract import Storage
from spotspeed.storage.local import LocalStorage
from spotspeed.storage.memory import MemoryStorage

ELSEWHERE = Identity("node-b", "another boot", "pid:[9]", 12, 34)
OTHER_PLACE = Identity("node-c", "third boot", "pid:[8]", 12, 34)
DIRECTORY = "step-000000000010.e000001.a"


@dataclass
class FakeTime:
    """A clock that jumps when somebody sleeps, and what happens meanwhile."""

    now_s: float = 0.0
    during_sleep: list[object] = field(default_factory=list)

    def clock(self) -> Clock:
        return Clock(lambda: self.now_s, self._sleep, lambda: 1_000_000 + self.now_s)

    def _sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds
        if self.during_sleep:
            self.during_sleep.pop(0)()  # type: ignore[operator]


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage("job")


def claim(storage: Storage, identity: Identity = ELSEWHERE, **options: object) -> Claim:
    options.setdefault("clock", FakeTime().clock())
    return claim_epoch(storage, identity=identity, **options)  # type: ignore[arg-type]


def dead_here() -> Identity:
    """An identity of this machine whose process has ended."""
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        child.wait()
        return replace(this_process(), pid=child.pid, start_ticks=1)


def test_the_first_launch_gets_epoch_one_at_once(storage: MemoryStorage) -> None:
    time = FakeTime()
    taken = claim(storage, clock=time.clock())
    assert (taken.epoch, taken.previous, time.now_s) == (1, None, 0.0)
    assert read_epochs(storage).newest == 1
    assert read_owner(storage) == taken.record


def test_a_restart_after_a_kill_is_immediate(storage: MemoryStorage) -> None:
    claim(storage, dead_here())
    time = FakeTime()
    taken = claim(storage, this_process(), clock=time.clock())
    assert (taken.epoch, time.now_s) == (2, 0.0)
    assert "gone" in taken.reason


def test_a_zombie_is_gone(storage: MemoryStorage) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    code = (
        f"from spotspeed.checkpoint.processes import _start_ticks\nprint(_start_ticks({child.pid}))"
    )
    alive = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    owner = replace(this_process(), pid=child.pid, start_ticks=int(alive.stdout))
    claim(storage, owner)
    with pytest.raises(OwnedError):
        claim(storage, this_process())
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert claim(storage, this_process()).epoch == 2
    child.wait()


def test_a_process_id_that_was_given_to_another_process_does_not_count(
    storage: MemoryStorage,
) -> None:
    me = this_process()
    claim(storage, replace(me, pid=os.getppid(), start_ticks=me.start_ticks + 1_000_000))
    assert claim(storage, me).epoch == 2


def test_a_living_job_on_this_machine_is_refused_with_the_facts(storage: MemoryStorage) -> None:
    code = "import sys; print(open('/proc/self/stat').read(), flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        ticks = int(child.stdout.readline().rpartition(")")[2].split()[19])
        me = this_process()
        claim(storage, replace(me, pid=child.pid, start_ticks=ticks))
        with pytest.raises(OwnedError) as caught:
            claim(storage, me)
        text = str(caught.value)
        assert me.host in text and str(child.pid) in text and "take_over" in text
        assert claim(storage, me, take_over=True).epoch == 2
        child.stdin.close()


def test_the_same_process_may_attach_again(storage: MemoryStorage) -> None:
    claim(storage, this_process())
    assert claim(storage, this_process()).epoch == 2


def test_a_silent_owner_elsewhere_is_replaced_after_two_of_its_periods(
    storage: MemoryStorage,
) -> None:
    claim(storage, ELSEWHERE, period_s=3.0)
    time = FakeTime()
    taken = claim(storage, OTHER_PLACE, period_s=60.0, clock=time.clock())
    assert taken.epoch == 2
    assert 6.0 <= time.now_s <= 7.5


def test_a_renewing_owner_elsewhere_is_refused(storage: MemoryStorage) -> None:
    first = claim(storage, ELSEWHERE).record
    time = FakeTime(during_sleep=[lambda: renew(storage, first, clock=FakeTime().clock())])
    with pytest.raises(OwnedError, match="renewed"):
        claim(storage, OTHER_PLACE, clock=time.clock())
    assert read_epochs(storage).newest == 1


def test_a_container_on_the_same_host_is_judged_by_its_counter(storage: MemoryStorage) -> None:
    claim(storage, replace(dead_here(), namespace="pid:[another container]"))
    time = FakeTime()
    assert claim(storage, this_process(), clock=time.clock()).epoch == 2
    assert time.now_s >= 10.0


@pytest.mark.parametrize("identity", [ELSEWHERE, OTHER_PLACE])
def test_a_released_path_is_free_at_once(storage: MemoryStorage, identity: Identity) -> None:
    release(storage, claim(storage, ELSEWHERE).epoch)
    release(storage, 1)
    time = FakeTime()
    assert claim(storage, identity, clock=time.clock()).epoch == 2
    assert time.now_s == 0.0


def test_a_saver_that_drains_for_a_dead_job_does_not_block_the_next(
    storage: MemoryStorage,
) -> None:
    record = claim(storage, ELSEWHERE).record
    record = renew(storage, record, state="draining")
    taken = claim(storage, OTHER_PLACE)
    assert taken.epoch == 2
    assert taken.previous == record
    with pytest.raises(OwnedError, match="epoch 1 is over"):
        renew(storage, record)
    assert read_owner(storage) == taken.record


def test_releasing_an_old_epoch_does_not_touch_the_new_owner(storage: MemoryStorage) -> None:
    claim(storage, ELSEWHERE)
    taken = claim(storage, OTHER_PLACE, take_over=True)
    release(storage, 1)
    assert read_owner(storage) == taken.record


def test_an_owner_that_died_between_claim_and_first_renewal_is_seen(
    storage: MemoryStorage,
) -> None:
    """The epoch's own record speaks where owner.json is older."""
    old = claim(storage, dead_here()).record
    claim(storage, this_process())
    storage.put(OWNER_KEY, encode_owner(old))
    owner = read_owner(storage)
    assert owner is not None and owner.epoch == 2


def test_a_damaged_owner_record_does_not_lock_the_path(storage: MemoryStorage) -> None:
    claim(storage, dead_here())
    storage.put(OWNER_KEY, b"\0" * 100)
    assert claim(storage, this_process()).epoch == 2


RACER = """
import sys
from spotspeed.checkpoint.ownership import claim_epoch
from spotspeed.errors import OwnedError
from spotspeed.storage.local import LocalStorage
storage = LocalStorage(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    print("epoch", claim_epoch(storage).epoch, flush=True)
except OwnedError as error:
    print("refused", flush=True)
sys.stdin.readline()
"""


def test_of_several_launches_at_once_one_wins_and_the_others_are_refused(tmp_path: Path) -> None:
    claim(LocalStorage(tmp_path), dead_here())
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path)], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True, bufsize=1)
        for _ in range(4)
    ]  # fmt: skip
    try:
        assert _answers(racers) == ["ready"] * 4
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
        assert sorted(_answers(racers)) == ["epoch 2", "refused", "refused", "refused"]
    finally:
        for racer in racers:
            racer.communicate("stop\n", timeout=30)


def _answers(racers: list[subprocess.Popen[str]]) -> list[str]:
    lines = []
    for racer in racers:
        assert racer.stdout is not None
        lines.append(racer.stdout.readline().strip())
    return lines


def test_living_owner_tells_a_command_line_who_is_there(storage: MemoryStorage) -> None:
    assert living_owner(storage) is None
    claim(storage, dead_here())
    assert living_owner(storage) is None
    first = claim(storage, ELSEWHERE).record
    time = FakeTime(during_sleep=[lambda: renew(storage, first, clock=FakeTime().clock())])
    owner = living_owner(storage, clock=time.clock())
    assert owner is not None and owner.identity == ELSEWHERE
    assert living_owner(storage, clock=FakeTime().clock()) is None


def test_where_an_epoch_began_is_recorded_once(storage: MemoryStorage) -> None:
    record_restored_from(storage, 2, DIRECTORY)
    record_restored_from(storage, 2, DIRECTORY)
    assert read_restored(storage, 2) == Place(1, 10)
    with pytest.raises(StorageError, match="already on record"):
        record_restored_from(storage, 2, None)
    record_restored_from(storage, 3, None)
    assert read_restored(storage, 3) is None
    assert read_epochs(storage).recorded == {2, 3}
    with pytest.raises(ObjectNotFoundError):
        read_restored(storage, 4)


def test_only_a_checkpoint_directory_can_be_a_beginning(storage: MemoryStorage) -> None:
    with pytest.raises(FormatError, match="global_step10"):
        record_restored_from(storage, 2, "global_step10")


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"epoch": 2}', b'{"epoch": 3, "restored_from": null}',
             b'{"epoch": 2, "restored_from": 7}', b'{"epoch": 2, "restored_from": "../../x"}'],
)  # fmt: skip
def test_a_damaged_record_of_a_beginning_names_its_file(
    storage: MemoryStorage, data: bytes
) -> None:
    storage.put(restored_key(2), data)
    with pytest.raises(FormatError, match=r"000002\.restored\.json"):
        read_restored(storage, 2)


def test_foreign_objects_among_the_epochs_are_ignored(storage: MemoryStorage) -> None:
    for key in ("epochs/notes.txt", "epochs/7.json", "epochs/deep/000009.json", epoch_key(3)):
        storage.put(key, b"x")
    assert read_epochs(storage).newest == 3
