"""Every sample of the epochs comes once, whatever number of ranks goes on.

`Checkpointer.batches` in one launch, a script's own loader with a GlobalSampler before and after.
Twelve samples do not divide by three ranks in micro batches of three: those take two at a time.
"""

import collections
import json
import math
from pathlib import Path

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks
DRIVER = "tests/distributed/drivers/batches_job.py"
SIZE, GLOBAL_BATCH, EPOCHS = 50, 12, 3


def test_three_epochs_on_two_then_three_then_one_rank_see_every_sample_alike(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    log.mkdir()
    steps = math.ceil(SIZE * EPOCHS / GLOBAL_BATCH)
    for ranks, stop_at, workers in ((2, 4, 0), (3, 9, 1), (1, steps + 5, 0)):
        finished = run_ranks(ranks, DRIVER, str(tmp_path / "saved"), str(log), str(stop_at),
                             str(workers), timeout_s=120)  # fmt: skip
        assert finished.output.count("each rank takes 2 of 2") == (ranks == 3), finished.output
    seen: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for file in log.iterdir():
        for line in file.read_text().splitlines():
            record = json.loads(line)
            seen[record["step"]].update(record["samples"])
            micro = 2 if file.name.startswith("3-") else 3
            assert len(record["samples"]) == micro or record["step"] == steps
    assert sorted(seen) == list(range(1, steps + 1))
    # 12 whole steps are 144 of the 150 samples; the last one has the other six.
    sizes = [sum(seen[step].values()) for step in sorted(seen)]
    assert sizes == [GLOBAL_BATCH] * (steps - 1) + [SIZE * EPOCHS % GLOBAL_BATCH]
    stream = sum((seen[step] for step in sorted(seen)), collections.Counter())
    assert len(stream) == SIZE and set(stream.values()) == {EPOCHS}
    first_epoch = sum((seen[step] for step in range(1, 5)), collections.Counter())
    assert set(first_epoch.values()) == {1}
