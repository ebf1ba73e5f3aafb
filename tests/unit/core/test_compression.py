"""Compression is chosen by what store and encoders take, and the choice does not swing."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest

from spotspeed.core.compression import ENCODE_BYTES_PER_S, ENOUGH_BYTES, Choice, Seen, look, told

GB = 1e9
FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Machine:
    """What really happens there: the pipeline of one file, by the times of its parts."""

    store_bytes_s: float
    encoders: int = 2
    encoder_bytes_s: float = ENCODE_BYTES_PER_S
    ratio: float = 0.7
    stage_bytes_s: float = 100 * GB
    writers: int = 1

    def run(self, is_encoded: bool) -> tuple[Seen, float]:
        stored = FILE_BYTES * (self.ratio if is_encoded else 1)
        write_s = stored * self.writers / self.store_bytes_s
        encoding_s = FILE_BYTES / self.encoder_bytes_s if is_encoded else 0.0
        encode_s = encoding_s * self.writers / self.encoders
        chunks_s = FILE_BYTES / self.stage_bytes_s
        total_s = max(write_s, encode_s, chunks_s)
        # Only the slowest part is waited for; what is left of the others is small.
        waits = [total_s if part == total_s else 0.02 * part
                 for part in (chunks_s, encode_s, write_s)]  # fmt: skip
        return Seen(is_encoded, FILE_BYTES, int(stored), *waits, encoding_s,
                    self.writers, self.encoders), total_s  # fmt: skip


def choose(machine: Machine, *, is_encoded: bool, files: int = 12) -> list[bool]:
    """What is chosen for each file, one after the other."""
    choice, chosen = Choice(is_encoded, machine.encoders), []
    for _ in range(files):
        chosen.append(choice.is_encoded)
        choice = look(choice, machine.run(choice.is_encoded)[0])
    return chosen


@pytest.mark.parametrize("is_encoded", [False, True])
@pytest.mark.parametrize(
    "machine,expected",
    [(Machine(5 * GB), False), (Machine(2 * GB), False), (Machine(0.1 * GB), True),
     (Machine(0.3 * GB, ratio=0.3), True), (Machine(0.4 * GB, writers=4), True),
     (Machine(8 * GB, writers=8), False)],
    ids=["nvme", "fast s3", "nfs", "compressible", "several ranks", "many ranks on nvme"],
)  # fmt: skip
def test_the_store_decides_wherever_it_is(machine: Machine, expected: bool, is_encoded: bool):
    chosen = choose(machine, is_encoded=is_encoded)
    assert set(chosen[3:]) == {expected}


def test_what_is_chosen_is_never_slower_than_it_must_be_and_settles() -> None:
    """Over random machines: at most two changes, and within the margin of the better way."""
    rng = random.Random(7)
    for _ in range(500):
        machine = Machine(10 ** rng.uniform(7, 10.5), rng.choice([1, 2, 4]),
                          10 ** rng.uniform(8, 9.3), rng.uniform(0.2, 0.95),
                          writers=rng.choice([1, 2, 8]))  # fmt: skip
        for start in (False, True):
            chosen = choose(machine, is_encoded=start, files=20)
            changes = sum(a is not b for a, b in pairwise(chosen))
            assert changes <= 2, (machine, chosen)
            best_s = min(machine.run(True)[1], machine.run(False)[1])
            # Where the encoders were never measured, they are what this file takes them for.
            if not any(chosen):
                continue
            assert machine.run(chosen[-1])[1] <= 2.05 * best_s, (machine, start)


def test_waiting_for_the_training_s_copies_changes_nothing() -> None:
    assert all(choose(Machine(0.9 * GB, stage_bytes_s=0.05 * GB), is_encoded=True))


def test_a_small_file_tells_nothing() -> None:
    choice = Choice(False, 2)
    seen = Seen(False, ENOUGH_BYTES - 1, ENOUGH_BYTES - 1, 0.0, 0.0, 100.0, 0.0, 1, 2)
    assert look(choice, seen) is choice


def test_a_speed_that_is_told_has_the_same_margin() -> None:
    plain, packed = Choice(False, 2), Choice(True, 2)
    assert not told(plain, 0.6 * GB).is_encoded and told(packed, 0.6 * GB).is_encoded
    assert told(plain, 0.4 * GB).is_encoded and not told(packed, 1.1 * GB).is_encoded
    assert "400 MB/s" in told(plain, 0.4 * GB).reason
