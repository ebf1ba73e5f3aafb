"""Workers outlive signals from strangers, obey their parent, and do not hang its exit."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from spotspeed.state.workers import DEFAULT_SIGNALS, WorkerInit, held_back, worker_init_fn

DRIVER = Path(__file__).with_name("drivers_workers.py")
ROOT = DRIVER.parents[3]


@pytest.mark.parametrize(
    ("mode", "method"),
    [("stranger", "fork"), ("parent", "fork"), ("persistent", "fork"), ("stranger", "spawn")],
)
def test_real_workers(mode, method):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, DRIVER, mode, method], env=env, cwd=ROOT, timeout=90,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_worker_init_survives_pickling():
    again = pickle.loads(pickle.dumps(WorkerInit(("SIGUSR2",), print)))
    assert again == WorkerInit(("SIGUSR2",), print)
    assert pickle.loads(pickle.dumps(worker_init_fn)).signals == DEFAULT_SIGNALS


def test_signals_held_back_arrive_afterwards():
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda *_: heard.append("heard"))
    try:
        with held_back(("SIGUSR2",)):
            # To this thread: a test runner's other threads do not block it.
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
            assert heard == []
            assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert heard == ["heard"]
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGUSR2, before)
