"""Ranks killed at arbitrary moments: what they had reported is there, and nothing is torn."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spotspeed.checkpoint.catalog import list_sealed
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.storage.local import LocalStorage
from tests.distributed.saver_ranks import LIMIT_S, wait_gone
from tests.ranks import ROOT

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[2])
from tests.distributed.drivers.saver_rank import Rank
actor = Rank(sys.argv[1], 0, 1, float(sys.argv[3]))
print(json.dumps({"saver": actor.reserve(1 << 20)["saver_pid"]}), flush=True)
for step in range(1000):
    actor.stage(step, 6, 300_000)
    actor.wait_staged(step)
    print(json.dumps({"staged": step}), flush=True)
    if step % 3 == 0:
        actor.result(step)
        print(json.dumps({"sealed": step}), flush=True)
"""
SEEDS = [int(text) for text in os.environ.get("SAVER_SEEDS", "1,2").split(",")]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("host_memory_gb", [0.0012, 0.1], ids=["small pool", "large pool"])
def test_whatever_was_staged_is_sealed_after_a_kill_at_any_moment(
    seed: int, host_memory_gb: float, tmp_path: Path
) -> None:
    path, chance = tmp_path / "store", random.Random(seed)
    command = [sys.executable, "-c", SCRIPT, str(path), str(ROOT), str(host_memory_gb)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        saver = json.loads(rank.stdout.readline())["saver"]
        time.sleep(chance.uniform(0.0, 1.0))  # the moment of the kill, not a synchronisation
        rank.kill()
        reports = [json.loads(line) for line in rank.stdout.read().splitlines()]
    wait_gone(saver, LIMIT_S)
    staged = {report["staged"] for report in reports if "staged" in report}
    storage = LocalStorage(path)
    sealed = {info.step: info for info in list_sealed(storage)}
    assert staged <= set(sealed), "staged and lost"
    assert len(sealed) <= len(staged) + 1, "sealed without having been staged"
    for info in sealed.values():
        assert CheckpointReader.open(storage, info.directory, digest=info.digest).verify().is_whole
    names = {file.name for file in path.rglob("*") if file.is_file()}
    assert names <= {"rank-00000.shard", "rank-00000.receipt", "manifest.json", "latest.json"}
